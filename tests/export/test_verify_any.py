"""Verify on what other tools made: folders without a manifest, graphs of other kinds, weights, GGUF files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from artifacts import copy_of, edit_json, tiny_artifact  # noqa: F401 - a fixture
from conftest import edgetune, write_jsonl
from edgetune.errors import InputError
from edgetune.export.graph_reader import Graph
from edgetune.export.readers import Weights, greedy, pieces
from edgetune.standalone_verify import verify_artifact


@pytest.fixture
def rows(tmp_path: Path, tiny_rows: list[dict[str, Any]]) -> Path:
    return write_jsonl(tmp_path / "held_out.jsonl", tiny_rows)


@pytest.fixture
def foreign(tiny_artifact: Path, tmp_path: Path) -> Path:  # noqa: F811
    """As the model builder leaves it."""
    folder = copy_of(tiny_artifact, tmp_path / "builder")
    for name in ("manifest.json", "golden.json", "inference_model.json", "README.md"):
        (folder / name).unlink()
    return folder


def _graph(folder: Path, change: Callable[[Any], None]) -> None:
    """Change the graph in a folder; its weights stay where they are."""
    import onnx

    model = onnx.load(folder / "model.onnx", load_external_data=False)
    change(model.graph)
    onnx.save(model, folder / "model.onnx")


def _pruned(graph: Any) -> None:
    """Logits of the last position only, as `prune_lm_head` leaves them."""
    import numpy as np
    from onnx import helper, numpy_helper

    _rename(graph, "logits", "all_logits")
    graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), "the_last"))
    graph.node.append(helper.make_node("Gather", ["all_logits", "the_last"], ["logits"], axis=1))
    output = next(output for output in graph.output if output.name == "logits")
    output.type.tensor_type.shape.dim[1].dim_value = 1


def _half_cache(graph: Any) -> None:
    """A KV cache in float16."""
    from onnx import TensorProto, helper

    first = []
    for value in graph.input:
        if value.name.startswith("past_key_values."):
            _rename(graph, value.name, f"{value.name}.32")
            first.append(helper.make_node("Cast", [value.name], [f"{value.name}.32"], to=TensorProto.FLOAT))
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    for value in graph.output:
        if value.name.startswith("present."):
            _rename(graph, value.name, f"{value.name}.32")
            graph.node.append(helper.make_node("Cast", [f"{value.name}.32"], [value.name], to=TensorProto.FLOAT16))
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    nodes = [*first, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _rename(graph: Any, old: str, new: str) -> None:
    for node in graph.node:
        for names in (node.input, node.output):
            for at, name in enumerate(names):
                if name == old:
                    names[at] = new


def test_a_builders_folder_against_a_folder(
    foreign: Path, tiny_model: Path, other_model: Path, rows: Path, tiny_rows: list[dict[str, Any]]
) -> None:
    same = verify_artifact(foreign, tiny_model, rows, 16, {}, None)
    assert same["passed"] and same["kld_mean"] < 1e-5 and same["golden"] == [] and same["precision"] == "unknown"
    assert same["perplexity"]["ratio_se"] < 1e-4 and same["delta_p_rms"] < 1e-4
    differs = verify_artifact(foreign, other_model, rows, 16, {}, None)
    assert differs["kld_mean"] > 0.01 and not differs["passed"]
    names = ("kld_median", "kld_p90", "kld_p95", "kld_p99", "kld_p99_9", "kld_max")
    assert [differs[name] for name in names] == sorted(differs[name] for name in names)
    for groups in (differs["by_position"], differs["by_token_class"]):
        assert sum(part["tokens"] for part in groups.values()) == differs["tokens"]
    assert {"digits", "punctuation", "special"} <= differs["by_token_class"].keys()
    worst = differs["worst"]
    assert len(worst) == 10 and [place["kld"] for place in worst] == sorted((p["kld"] for p in worst), reverse=True)
    assert worst[0]["kld"] == differs["kld_max"]
    number = int(worst[0]["where"].removeprefix("held_out.jsonl:"))
    assert f"What is {number - 1} plus" in worst[0]["context"]
    assert (worst[0]["context"] + worst[0]["next"]["text"]).endswith(
        tuple(f"assistant\n{text}"[: -len(rest) or None] for text in (f"It is {2 * (number - 1)}.<|im_end|>",) for rest in
              (text[i:] for i in range(1, len(text) + 1)))
    )  # fmt: skip
    assert 0 <= worst[0]["next"]["merged"] <= 1 and worst[0]["merged"][0]["probability"] <= 1


def test_weights_against_weights_and_a_graph_as_reference(
    tiny_artifact: Path,  # noqa: F811
    tiny_model: Path,
    other_model: Path,
    rows: Path,
) -> None:
    weights = verify_artifact(other_model, tiny_model, rows, 8, {}, None)
    graph = verify_artifact(other_model, tiny_artifact, rows, 8, {}, None)
    assert weights["kinds"] == {"merged": "weights", "artifact": "weights"}
    assert graph["kinds"] == {"merged": "onnx", "artifact": "weights"}
    assert graph["kld_mean"] == pytest.approx(weights["kld_mean"], rel=1e-3) and weights["kld_mean"] > 0.01


def test_a_gguf_file_on_either_side(foreign: Path, tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    import sys

    sys.path.insert(0, str(Path(__file__).parent.parent / "models"))
    from tiny_gguf import write_gguf

    file = write_gguf(tiny_model, tmp_path / "tiny.gguf")
    reference = verify_artifact(foreign, file, rows, 4, {}, None)
    candidate = verify_artifact(file, tiny_model, rows, 4, {}, None)
    assert reference["kld_mean"] < 1e-5 and candidate["kld_mean"] < 1e-9
    assert reference["tokens"] == candidate["tokens"]


def test_rows_fed_in_steps_give_the_same_where_nothing_depends_on_it(
    foreign: Path, other_model: Path, tmp_path: Path, tiny_rows: list[dict[str, Any]]
) -> None:
    """Rows longer than what is compared at once, too."""
    long = {"messages": [{"role": "user", "content": "add " * 60}, {"role": "assistant", "content": "name " * 60}]}
    rows = write_jsonl(tmp_path / "long.jsonl", [long, *tiny_rows[:3]])
    whole = verify_artifact(foreign, other_model, rows, None, {}, None)
    assert whole["step"] is None and whole["by_position"].keys() >= {"0-63", "128-255"}
    for step in (1, 7, 300):
        stepped = verify_artifact(foreign, other_model, rows, None, {}, None, step=step)
        assert stepped["step"] == step and stepped["tokens"] == whole["tokens"]
        assert stepped["kld_mean"] == pytest.approx(whole["kld_mean"], rel=1e-4)
        assert stepped["worst"][0]["where"] == whole["worst"][0]["where"]


def test_a_graph_of_last_logits_is_fed_token_by_token(
    foreign: Path, other_model: Path, rows: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = verify_artifact(foreign, other_model, rows, 3, {}, None)
    _graph(foreign, _pruned)
    pruned = verify_artifact(foreign, other_model, rows, 3, {}, None)
    assert pruned["step"] == 1 and "last position only" in capfd.readouterr().err
    assert pruned["kld_mean"] == pytest.approx(whole["kld_mean"], rel=1e-4)
    with pytest.raises(InputError, match="--step 1"):
        verify_artifact(foreign, other_model, rows, 3, {}, None, step=2)


def test_a_cache_in_float16(foreign: Path, tiny_model: Path, rows: Path) -> None:
    _graph(foreign, _half_cache)
    whole = verify_artifact(foreign, tiny_model, rows, 3, {}, None)
    stepped = verify_artifact(foreign, tiny_model, rows, 3, {}, None, step=1)
    assert whole["kld_mean"] < stepped["kld_mean"] < 1e-3  # in one piece nothing is read from the cache


def test_a_graph_for_prompts_and_one_for_tokens(foreign: Path, tiny_model: Path) -> None:
    ids = list(range(3, 30))
    wanted = Weights(tiny_model)
    shutil.copy(foreign / "model.onnx", foreign / "token.onnx")
    stages = [
        {"prompt": {"filename": "model.onnx", "run_on_token_gen": False}},
        {"token": {"filename": "token.onnx", "run_on_prompt": False}},
    ]
    config = json.loads((foreign / "genai_config.json").read_text())
    config["model"]["decoder"]["pipeline"] = stages
    edit_json(foreign / "genai_config.json", model=config["model"])
    graph = Graph(foreign)
    assert greedy(graph, ids, 6, set()) == greedy(wanted, ids, 6, set())
    _graph(foreign, _pruned)  # only the graph for prompts: then only tokens can follow
    assert Graph(foreign).most == 1
    stages[1]["token"]["run_on_prompt"] = True
    edit_json(foreign / "genai_config.json", model=config["model"])
    with pytest.raises(InputError, match="pipeline"):
        Graph(foreign)


def test_pieces_are_the_row_in_order(tiny_model: Path) -> None:
    import torch

    reader = Weights(tiny_model)
    ids = [i % 300 + 5 for i in range(400)]
    whole = torch.cat(list(pieces(reader, ids)))
    assert [len(piece) for piece in pieces(reader, ids, 100)] == [256, 144]
    torch.testing.assert_close(torch.cat(list(pieces(reader, ids, 100))), whole, atol=1e-4, rtol=1e-4)
    reader.most = 64  # a row whose logits would take too much memory is read in parts
    torch.testing.assert_close(torch.cat(list(pieces(reader, ids))), whole, atol=1e-4, rtol=1e-4)


def _no_graph(folder: Path) -> None:
    (folder / "model.onnx").unlink()


def _no_weights(folder: Path) -> None:
    (folder / "model.onnx.data").unlink()


def _torn(folder: Path) -> None:
    (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:2000])


def _no_decoder(folder: Path) -> None:
    edit_json(folder / "genai_config.json", model={"context_length": 64, "eos_token_id": 2})


def _other_tokens(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    names = sorted(vocabulary, key=vocabulary.get)
    moved = {name: vocabulary[other] for name, other in zip(names[3:], [*names[4:], names[3]], strict=True)}
    tokenizer["model"]["vocab"] = {**{name: vocabulary[name] for name in names[:3]}, **moved}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def _narrow(folder: Path) -> None:
    def change(graph: Any) -> None:
        import numpy as np
        from onnx import helper, numpy_helper

        _rename(graph, "logits", "all_logits")
        graph.initializer.append(numpy_helper.from_array(np.arange(380), "some_tokens"))
        graph.node.append(helper.make_node("Gather", ["all_logits", "some_tokens"], ["logits"], axis=2))
        next(o for o in graph.output if o.name == "logits").type.tensor_type.shape.dim[2].dim_value = 380

    _graph(folder, change)


def _another_input(folder: Path) -> None:
    def change(graph: Any) -> None:
        from onnx import TensorProto, helper

        graph.input.append(helper.make_tensor_value_info("image", TensorProto.FLOAT, [1]))

    _graph(folder, change)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_no_graph, "names no graph"),
        (_no_weights, "cannot load the graph"),
        (_torn, "cannot load the graph"),
        (_no_decoder, "decoder"),
        (_other_tokens, "another vocabulary"),
        (_narrow, "has 380 tokens, the model 384"),
        (_another_input, "needs the input image"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    spoil: Callable[[Path], None], says: str, foreign: Path, tiny_model: Path, rows: Path
) -> None:
    spoil(foreign)
    with pytest.raises(InputError, match=says) as caught:
        verify_artifact(foreign, tiny_model, rows, 2, {}, None)
    assert caught.value.fix


def test_what_is_no_model_is_refused(foreign: Path, tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.gguf").write_text("no")
    for path in (tmp_path / "empty", tmp_path / "nothing", tmp_path / "text.gguf", Path("someone/model")):
        with pytest.raises(InputError):
            verify_artifact(path, tiny_model, rows, 2, {}, None)
        with pytest.raises(InputError):
            verify_artifact(foreign, path, rows, 2, {}, None)
    with pytest.raises(InputError, match="--against"):
        verify_artifact(foreign, None, rows, 2, {}, None)


def test_a_changed_artifact_of_edgetunes_own_is_refused(
    tiny_artifact: Path,  # noqa: F811
    tiny_model: Path,
    rows: Path,
    tmp_path: Path,
) -> None:
    changed = copy_of(tiny_artifact, tmp_path)
    (changed / "README.md").write_text("changed")
    with pytest.raises(InputError, match="manifest"):
        verify_artifact(changed, tiny_model, rows, 2, {}, None)


def test_on_the_command_line(foreign: Path, other_model: Path, rows: Path) -> None:
    done = edgetune("verify", foreign, "--against", other_model, "--data", rows, "--rows", "3", "--step", "5")
    assert done.returncode == 3 and "Traceback" not in done.stderr
    for text in (
        "Δp of the next token",
        "ratio",
        "±",
        "0-63",
        "digits",
        "furthest apart",
        "held_out.jsonl:",
        "5 tokens",
    ):
        assert text in done.stdout, done.stdout
    assert "--limit" in done.stderr
    (foreign / "model.onnx").write_text("no graph")
    refused = edgetune("verify", foreign, "--against", other_model, "--data", rows, "--json")
    assert refused.returncode == 2 and refused.stdout == "" and "Traceback" not in refused.stderr
    assert "cannot load the graph" in refused.stderr and "fix:" in refused.stderr
