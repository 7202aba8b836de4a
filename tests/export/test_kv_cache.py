"""An int8 KV cache: exported for the CPU from calibrated scales, and next to the float one in what it says."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from edgetune.errors import InputError
from edgetune.export.decoder import export_decoder
from edgetune.export.graph_reader import Graph
from edgetune.export.kv_cache import write_scales
from edgetune.export.quantized import Examples
from edgetune.export.readers import Weights
from edgetune.export.targets import Target, load_target


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


def test_only_where_attention_has_it() -> None:
    given = {"description": "x", "needs": "y", "precision": "int4", "kv_cache": "int8"}
    assert Target.model_validate({**given, "provider": "cpu"}).calibrates
    with pytest.raises(ValueError, match="goes with the providers cpu and cuda"):
        Target.model_validate({**given, "provider": "webgpu"})


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
