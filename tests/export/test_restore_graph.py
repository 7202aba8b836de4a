"""The graph that takes up prompts which were read before: which exports have it, and that it is proved on each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from conftest import write_jsonl
from edgetune.errors import EdgetuneError
from edgetune.export.graph_check import check_graph
from edgetune.export.package import _check_restoring
from edgetune.export.restore_graph import write_restore_graph
from edgetune.export.targets import load_target
from edgetune.recipe import ExportSection
from edgetune.run import outputs, read_manifest
from edgetune.runtime import load
from edgetune.runtime.options import GenerationOptions
from edgetune.standalone import export_model

PROMPT = "The name of the river is long, and it flows through all of the country. " * 2
OPTIONS = GenerationOptions(max_tokens=8, logprobs=2)


@pytest.fixture(scope="module")
def artifact(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("restoring") / "tiny"
    export_model(tiny_model, out, ExportSection(target="cpu-fp32", max_length=256))
    return out


def config(artifact: Path) -> Any:
    return json.loads((artifact / "genai_config.json").read_text())


def test_an_export_has_it(artifact: Path) -> None:
    """Listed, sound, and over the same weights."""
    assert "restore.onnx" in read_manifest(artifact)["outputs"]
    found = check_graph(artifact / "restore.onnx", load_target("cpu-fp32"))
    assert found["weights_file"] == "model.onnx.data"
    plain = check_graph(artifact / "model.onnx", load_target("cpu-fp32"))["operators"]
    own = {"If": 1, "Shape": 1, "Split": 1, "Slice": 4, "ConstantOfShape": 1}  # two layers
    assert {name: found["operators"][name] - plain.get(name, 0) for name in own} == own


def test_it_writes_an_int8_cache_and_takes_it_up(tiny_model: Path, tmp_path: Path) -> None:
    target = {"description": "x", "needs": "y", "provider": "cpu", "precision": "int8", "kv_cache": "int8"}
    (tmp_path / "target.yaml").write_text(json.dumps(target))
    rows = write_jsonl(
        tmp_path / "rows.jsonl", [{"text": f"Number {n} is {n * n}, and so on. " * 9} for n in range(24)]
    )
    section = ExportSection(target=str(tmp_path / "target.yaml"), max_length=256)
    export_model(tiny_model, tmp_path / "out", section, data=rows)
    answers = []
    for _ in range(2):
        with load(tmp_path / "out", prompt_cache=tmp_path / "kept") as session:
            session.read(PROMPT)
            answers.append(session.generate(PROMPT, OPTIONS))
    with load(tmp_path / "out") as session:
        answers.append(session.generate(PROMPT, OPTIONS))
    (kept,) = (tmp_path / "kept").iterdir()
    assert b'"I8"' in kept.read_bytes()[:4096]
    assert len({(one.ids, one.logprobs) for one in answers}) == 1
    with load(
        tmp_path / "out"
    ) as session:  # each call makes a new cache of the one before, which a call that was ended has lost
        reader = session._reader
        for interrupted in (False, True):
            reader.forget()
            context = reader.begin(session.encode(PROMPT), 1, None, "exact")
            context.interrupted = interrupted
            reader.keep(context)
            assert bool(reader._kept) != interrupted


def test_a_cache_that_slides_has_none(artifact: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(artifact, tmp_path / "copy"))
    (copy / "restore.onnx").unlink()
    found = config(copy)
    found["model"]["decoder"]["sliding_window"] = {"window_size": 16}
    assert not write_restore_graph(copy, found)
    found = config(copy)
    found["model"]["decoder"]["num_hidden_layers"] = 3  # more than the graph has
    assert not write_restore_graph(copy, found)
    assert not (copy / "restore.onnx").exists()


def test_caches_of_several_shapes_have_none(artifact: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(artifact, tmp_path / "copy"))
    model = onnx.load(copy / "model.onnx", load_external_data=False)
    past = next(value for value in model.graph.input if value.name == "past_key_values.1.value")
    past.type.tensor_type.shape.dim[1].dim_value = 7
    onnx.save(model, copy / "model.onnx")
    assert not write_restore_graph(copy, config(copy))


def test_an_export_is_given_up_where_it_answers_otherwise(artifact: Path, tmp_path: Path) -> None:
    """What is taken up must be what was read: here the last tokens of a cache are lost."""
    _check_restoring(artifact)
    copy = Path(shutil.copytree(artifact, tmp_path / "copy"))
    model = onnx.load(copy / "restore.onnx", load_external_data=False)
    (chosen,) = model.graph.node
    copying = next(one.g for one in chosen.attribute if one.name == "then_branch")
    for node in copying.node:  # the cache is taken to be in front of what the buffer has in its place: nothing
        if node.op_type == "Slice":
            node.input[1] = "restored.none"
        if node.op_type == "Concat" and "behind" in node.input[1]:
            node.input[:] = [node.input[1]]
    copying.initializer.append(numpy_helper.from_array(np.array([0], np.int64), "restored.none"))
    onnx.save(model, copy / "restore.onnx")
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").unlink()
    (copy / "manifest.json").write_text(json.dumps({**manifest, "outputs": outputs(copy)}))
    with pytest.raises(EdgetuneError, match="kept on disk is answered otherwise"):
        _check_restoring(copy)
