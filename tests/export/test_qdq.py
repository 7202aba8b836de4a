"""Static QDQ graphs of the tiny model: made, checked, and run on the CPU token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from artifacts import copy_of, tiny_artifact  # noqa: F401
from edgetune.errors import InputError
from edgetune.export.graph_check import check_graph, operators
from edgetune.export.qdq import DECODE, FILLED, LEAST_TOKENS, PREFILL, SESSION, TOTAL, to_static
from edgetune.export.targets import StaticShapes, load_target
from edgetune.export.weight_check import compare_weights
from edgetune.runtime.providers import open_session

CONTEXT, LENGTH = 64, 16


def rows() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, 384, 40).tolist() for _ in range(12)]


@pytest.fixture(scope="module", params=[8, 16])
def static(request: pytest.FixtureRequest, tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    folder = copy_of(tiny_artifact, tmp_path_factory.mktemp("static"))
    shapes = StaticShapes(prefill=LENGTH, activation_bits=request.param)
    report = to_static(folder, shapes, CONTEXT, rows())
    assert report["calibration_tokens"] == 480 and report["activation_bits"] == request.param
    return folder


def run(
    file: Path, ids: list[int], cache: dict[str, Any], before: int, padding: int = 0
) -> tuple[np.ndarray, dict[str, Any]]:
    session = open_session(file, session_options=SESSION)
    total = before + len(ids)
    feed = {
        "input_ids": np.array([ids + [0] * padding], np.int64),
        FILLED: np.array([[total - 1]], np.int32),
        TOTAL: np.array([total], np.int32),
        **cache,
    }
    names = [name.replace("past_key_values", "present") for name in cache]
    logits, *present = session.run(["logits", *names], feed)
    return logits[0, : len(ids)], dict(zip(cache, present, strict=True))


def empty(file: Path) -> dict[str, Any]:
    graph = onnx.load(file, load_external_data=False).graph
    return {
        value.name: np.zeros([dim.dim_value for dim in value.type.tensor_type.shape.dim], np.float32)
        for value in graph.input
        if value.name.startswith("past_key_values.")
    }


def test_both_graphs_are_static_and_fit_the_npus(static: Path) -> None:
    for name in ("qnn-npu", "vitisai-fpga"):
        for file in (PREFILL, DECODE):
            found = check_graph(static / file, load_target(name))
            assert found["static"] and found["weights_file"] == "model.onnx.data"
            assert found["operators"]["DequantizeLinear"] > 0
    assert not (static / "model.onnx").exists()
    prefill, decode = (operators(onnx.load(static / file, load_external_data=False)) for file in (PREFILL, DECODE))
    assert prefill - decode == {"Sub": 2, "Div": 1, "Add": 1, "Mul": 1}  # the window's two numbers
    assert sum(path.stat().st_size for path in static.glob("*.data")) == (static / "model.onnx.data").stat().st_size


@pytest.mark.parametrize("prompt", [LENGTH, 5])
def test_they_say_what_the_float_graph_says(static: Path, tiny_artifact: Path, prompt: int) -> None:  # noqa: F811
    """A row through the prefill graph and one token at a time through the other, against the builder's graph."""
    ids = rows()[0][: prompt + 8]
    wanted = float_logits(tiny_artifact, ids)
    first, cache = run(static / PREFILL, ids[:prompt], empty(static / PREFILL), 0, LENGTH - prompt)
    found = [first]
    for at in range(prompt, len(ids)):
        logits, cache = run(static / DECODE, ids[at : at + 1], cache, at)
        found.append(logits)
    p, q = (value - np.log(np.exp(value).sum(-1, keepdims=True)) for value in (wanted, np.concatenate(found)))
    kld = float((np.exp(p) * (p - q)).sum(-1).mean())
    assert kld < 0.05, kld
    assert (p.argmax(-1) == q.argmax(-1)).mean() > 0.8


def float_logits(artifact: Path, ids: list[int]) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(artifact / "model.onnx"), providers=["CPUExecutionProvider"])
    past = {
        value.name: np.zeros((1, 2, 0, 16), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values.")
    }
    feed = {"input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, len(ids)), np.int64), **past}
    return np.asarray(session.run(["logits"], feed)[0][0])


def test_its_weights_are_the_models(static: Path, tiny_model: Path) -> None:
    report = compare_weights(tiny_model, static / DECODE, "int8")
    assert report["matrices"] >= 11 and 0 < report["worst"]["relative_error"] < 0.02


def test_the_runtime_configuration_names_both(static: Path) -> None:
    decoder = json.loads((static / "genai_config.json").read_text())["model"]["decoder"]
    stages = decoder["pipeline"][0]
    assert {stage["filename"] for stage in stages.values()} == {PREFILL, DECODE}
    assert decoder["sliding_window"]["window_size"] == LENGTH and "filename" not in decoder
    assert SESSION.items() <= decoder["session_options"].items()


def test_what_cannot_be_made_static(tiny_artifact: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = copy_of(tiny_artifact, tmp_path)
    with pytest.raises(InputError, match=f"at least {LEAST_TOKENS} tokens of calibration rows, not 3"):
        to_static(folder, StaticShapes(), CONTEXT, [[1, 2, 3]])
    with pytest.raises(InputError, match=r"no multiple of the 64(.|\n)*set it to 64"):
        to_static(folder, StaticShapes(), 100, rows())
    assert (folder / "model.onnx").is_file()


@pytest.mark.parametrize("prompt", [LENGTH, 5])
def test_the_gate_reads_them(static: Path, tiny_artifact: Path, prompt: int) -> None:  # noqa: F811
    """Windows and single tokens, in whatever pieces: logits are those of the graphs called by hand, above."""
    from edgetune.export.graph_reader import Graph
    from edgetune.export.readers import greedy, longest

    ids = rows()[0][: prompt + 8]
    graph = Graph(static)
    assert graph.most is None and graph.vocabulary == 384 and longest(static) == CONTEXT
    graph.reset()
    first = graph.feed(ids[:prompt])
    found = np.concatenate([first.numpy(), *(graph.feed([token]).numpy() for token in ids[prompt:])])
    by_hand, cache = run(static / PREFILL, ids[:prompt], empty(static / PREFILL), 0, LENGTH - prompt)
    logits = [by_hand]
    for at in range(prompt, len(ids)):
        more, cache = run(static / DECODE, ids[at : at + 1], cache, at)
        logits.append(more)
    np.testing.assert_array_equal(found, np.concatenate(logits))
    np.testing.assert_allclose(graph.logits(ids).numpy(), found, atol=0.02)  # windows in place of single tokens
    graph.reset()
    uneven = [graph.feed(ids[:3]), graph.feed(ids[3:])]  # goes on token by token, as no window begins there
    np.testing.assert_allclose(np.concatenate([part.numpy() for part in uneven]), found, atol=0.02)
    whole = rows()[1] + rows()[2][: CONTEXT - 40]
    np.testing.assert_allclose(graph.logits(whole)[-1], single(graph, whole)[-1], atol=0.02)
    assert greedy(graph, ids, 4, set()) == greedy(Graph(static), ids, 4, set())
    assert graph.shares() == {"CPUExecutionProvider": 1.0}


def single(graph: Any, ids: list[int]) -> np.ndarray:
    graph.reset()
    return np.concatenate([graph.feed([token]).numpy() for token in ids])


def test_windows_of_another_kind_are_refused(static: Path, tmp_path: Path) -> None:
    from edgetune.export.graph_reader import Graph

    folder = copy_of(static, tmp_path)
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["decoder"]["sliding_window"]["alignment"] = "right"
    (folder / "genai_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="fixed shape"):
        Graph(folder)
