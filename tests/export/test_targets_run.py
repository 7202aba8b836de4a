"""Every target for another device, exported from the tiny model: checked here, run where its provider finds a device.

`make test-providers` installs the provider plugins that this machine's package index has, and runs this.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import edgetune
from edgetune.errors import InputError
from edgetune.export.package import export
from edgetune.export.quantized import Examples
from edgetune.export.targets import load_target
from edgetune.run import Work
from edgetune.runtime.artifact import open_artifact
from edgetune.runtime.providers import status
from edgetune.runtime.session import Session

QUICK = ("cuda-fp16", "qnn-npu")  # the others are `slow`: the builder takes seconds for each


class Row:
    def __init__(self, ids: list[int]) -> None:
        self.ids = ids


def exported(model: Path, folder: Path, name: str) -> tuple[Path, dict[str, Any]]:
    target, rng = load_target(name), np.random.default_rng(0)
    artifact, report = folder / "artifact", folder / "report"
    artifact.mkdir()
    report.mkdir()
    rows: Any = [Row(rng.integers(3, 384, 40).tolist()) for _ in range(12)] if target.calibrates else ()
    base = {"id": "tiny", "source": "folder", "revision": None, "license": None, "upstream": None, "sha256": "0"}
    work = Work("export", {}, {"target": target.options_of_work()})
    found = export(
        model, target, 128, name="tiny", chain={"base": base}, work=work, examples=Examples(rows), trust_remote_code=False,
        artifact=artifact, report=report,
    )  # fmt: skip
    return artifact, found


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in (
            "cuda-fp16", "cuda-bf16", "cuda-int4", "dml-int4", "webgpu-int4", "tensorrt-rtx-fp16", "openvino-cpu",
            "mobile-arm64-int4", "qnn-npu", "vitisai-fpga",
        )
    ],
)  # fmt: skip
def test_exported_checked_and_run_where_it_can_be(tiny_model: Path, tmp_path: Path, name: str) -> None:
    target = load_target(name)
    artifact, found = exported(tiny_model, tmp_path, name)
    here = status(target.provider)
    card = (artifact / "README.md").read_text()
    device = found["device"]
    assert device["provider"] == target.provider and device["ran"] == here.runs
    assert all(graph["static"] == bool(target.static) for graph in found["graphs"].values())
    assert ("checked, not run on the device" in card) == (not here.runs)
    if here.runs:
        return
    assert found["weights"]["matrices"] >= 9 and found["weights"]["not_found"] == []
    assert device["ran_on_cpu"] or device["cpu_says"], device
    assert device["ran_on_cpu"] == (name != "cuda-bf16" and not target.static)  # the CPU has no bfloat16 attention
    with pytest.raises(InputError, match="the CPU does not take its place"):
        Session(open_artifact(artifact))
    done = edgetune("generate", artifact, "Hello", timeout=60)
    assert done.returncode == 2 and "needs the execution provider" in done.stderr and not done.stdout
    assert json.loads((artifact / "manifest.json").read_text())["options"]["target"]["limits"]
