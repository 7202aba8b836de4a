"""An int8 KV cache: exported for the CPU from calibrated scales, and next to the float one in what it says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.torch import load_file, save_file

from conftest import write_jsonl
from edgetune.errors import InputError
from edgetune.export.decoder import export_decoder
from edgetune.export.graph_reader import Graph
from edgetune.export.kv_cache import write_scales
from edgetune.export.quantized import Examples
from edgetune.export.readers import Weights
from edgetune.export.targets import Target, load_target
from edgetune.recipe import ExportSection
from edgetune.standalone import export_model
from edgetune.standalone_verify import verify_artifact


def rows() -> list[Any]:
    rng = np.random.default_rng(0)
    return [SimpleNamespace(ids=rng.integers(3, 384, 40).tolist()) for _ in range(12)]


def test_scales_hold_what_the_rows_give(tiny_model: Path, tmp_path: Path) -> None:
    options = write_scales(tiny_model, [row.ids for row in rows()], tmp_path / "scales.json")
    assert options["kv_cache_quant_scheme"] == "int8_per_channel"
    found = json.loads((tmp_path / "scales.json").read_text())
    assert found["qmax"] == 128 and len(found["scales"]["k_scales"]) == 2
    assert all(len(layer) == 2 * 16 and min(layer) > 0 for layer in found["scales"]["v_scales"])
    with pytest.raises(InputError, match="at least 256 tokens of calibration rows, not 2"):
        write_scales(tiny_model, [[1, 2]], tmp_path / "few.json")


def test_keys_that_are_no_numbers(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"].fill_(3e38)  # a number, but no sum of such is
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="keys or values are not finite numbers") as caught:
        write_scales(folder, [row.ids for row in rows()], tmp_path / "scales.json")
    assert caught.value.where == str(folder) and not (tmp_path / "scales.json").exists()


def test_only_where_attention_has_it() -> None:
    given = {"description": "x", "needs": "y", "precision": "int4", "kv_cache": "int8"}
    assert Target.model_validate({**given, "provider": "cpu"}).calibrates
    with pytest.raises(ValueError, match="goes with the providers cpu and cuda"):
        Target.model_validate({**given, "provider": "webgpu"})


def test_a_target_of_ones_own_with_it_passes_the_gate_or_misses_it(tiny_model: Path, tmp_path: Path) -> None:
    """Per-module bits and the cache, as the README has them; through export, ONNX Runtime GenAI, and the gate."""
    (tmp_path / "mine.yaml").write_text(
        "description: x\nneeds: y\nprovider: cpu\nprecision: int8\nkv_cache: int8\n"
        "quantization:\n  method: min_max\n  bits: 8\n  block_size: 32\n"
        "  modules: {down_proj: {bits: 8, block_size: 64}, model.layers.0.self_attn.v_proj: {bits: 8, block_size: 16}}\n"
    )
    made = [
        {"prompt": f"What is {n} plus {n}?", "completion": f"It is {2 * n}, one two three four five six."}
        for n in range(16)
    ]
    rows = write_jsonl(tmp_path / "rows.jsonl", made)
    section = ExportSection(target=str(tmp_path / "mine.yaml"), max_length=128)
    found = export_model(tiny_model, tmp_path / "artifact", section, data=rows)
    grids = found["quantization"]["grids"]
    assert sorted(grids.values()) == [1, 2, 12], grids  # v of a layer, down of both, the others with the tied head
    assert "in 8 bits a number" in (tmp_path / "artifact/README.md").read_text()
    graph = onnx.load(tmp_path / "artifact/model.onnx", load_external_data=False).graph
    types = {value.type.tensor_type.elem_type for value in graph.input if value.name.startswith("past_key_values")}
    assert types == {onnx.TensorProto.INT8}
    report = verify_artifact(tmp_path / "artifact", tiny_model, rows, 4, {"top1_agreement": 0.8}, None)
    assert report["passed"] and report["kld_mean"] > 0
    strict = verify_artifact(tmp_path / "artifact", tiny_model, rows, 4, {"kld_mean": report["kld_mean"] / 2}, None)
    assert not strict["passed"] and "kld_mean" in strict["failures"][0]


def test_it_says_what_the_float_cache_says(tiny_model: Path, tmp_path: Path) -> None:
    target = load_target("cpu-fp32").model_copy(update={"kv_cache": "int8"})
    artifact, report = tmp_path / "artifact", tmp_path / "report"
    artifact.mkdir()
    report.mkdir()
    export_decoder(tiny_model, target, 128, artifact=artifact, report=report, name="tiny", examples=Examples(rows()))
    graph = onnx.load(artifact / "model.onnx", load_external_data=False).graph
    types = {value.type.tensor_type.elem_type for value in graph.input if value.name.startswith("past_key_values")}
    assert types == {onnx.TensorProto.INT8}
    ids = rows()[3].ids
    wanted, found = Weights(tiny_model), Graph(artifact)
    wanted.reset()
    right = wanted.feed(ids).log_softmax(-1)
    found.reset()
    ours = [found.feed(ids[:30]), *(found.feed(ids[i : i + 1]) for i in range(30, 40))]
    kld = sum(
        float((p.exp() * (p - q)).sum())
        for part, p in zip(ours, right.split([30, *[1] * 10]), strict=True)
        for q in [part.log_softmax(-1)]
    ) / len(ids)
    assert 0 < kld < 0.02, kld
