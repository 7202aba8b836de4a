"""Every target for another device, exported from the tiny model: checked here, run where its provider finds a device.

`make test-providers` installs the provider plugins that this machine's package index has, and runs this.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import edgetune, write_jsonl
from edgetune.errors import InputError
from edgetune.export.package import export
from edgetune.export.quantized import Examples
from edgetune.export.targets import load_target, status_of
from edgetune.run import Work
from edgetune.runtime.artifact import open_artifact
from edgetune.runtime.providers import PROVIDERS, status
from edgetune.runtime.session import Session
from edgetune.standalone_verify import verify_artifact

QUICK = ("cuda-fp16", "mobile-arm64-int4", "qnn-npu")  # the others are `slow`: the builder takes seconds for each


class Row:
    def __init__(self, ids: list[int]) -> None:
        self.ids = ids


def exported(model: Path, folder: Path, name: str) -> tuple[Path, dict[str, Any]]:
    target, rng = load_target(name), np.random.default_rng(0)
    artifact, report = folder / "artifact", folder / "report"
    artifact.mkdir()
    report.mkdir()
    rows: Any = [Row(rng.integers(3, 384, 40).tolist()) for _ in range(30)] if target.calibrates else ()
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
    here = status_of(target)
    card = (artifact / "README.md").read_text()
    device = found["device"]
    assert device["provider"] == target.provider and device["ran"] == here.runs
    assert all(graph["static"] == bool(target.static) for graph in found["graphs"].values())
    assert ("checked, not run on the device" in card) == (not here.runs)
    if here.runs:
        if target.provider != "cpu":
            verified_on_its_device(artifact, tiny_model, tmp_path)
        return
    assert found["weights"]["matrices"] >= 9 and found["weights"]["not_found"] == []
    assert found["weights"]["vectors"] == (5 if not target.static else found["weights"]["vectors"])
    assert target.needs in card and "the best token the same in" in card and target.graph.forbidden_types[0] in card
    if target.provider == "cpu":  # for another processor: the graph runs here, and says nothing of that one
        assert device["ran_on_cpu"]
        return
    assert device["ran_on_cpu"] or device["cpu_says"], device
    assert device["ran_on_cpu"] == (name != "cuda-bf16")  # the CPU has no bfloat16 attention
    with pytest.raises(InputError, match="the CPU does not take its place"):
        Session(open_artifact(artifact))
    done = edgetune("generate", artifact, "Hello", timeout=60)
    assert done.returncode == 2 and "needs the execution provider" in done.stderr and not done.stdout
    assert json.loads((artifact / "manifest.json").read_text())["options"]["target"]["limits"]


def verified_on_its_device(artifact: Path, model: Path, folder: Path) -> None:
    rows = write_jsonl(
        folder / "rows.jsonl", [{"prompt": f"{n} plus {n}?", "completion": f"It is {2 * n}."} for n in range(4)]
    )
    report = verify_artifact(artifact, model, rows, None, {"kld_mean": 9, "kld_p99": 99, "top1_agreement": 0.01, "perplexity_ratio": 9}, None)  # fmt: skip
    name = load_manifest(artifact)["options"]["target"]["provider"]
    assert report["passed"] and report["device"]["ran"] and report["device"]["provider"] == name
    assert report["device"]["shares"][PROVIDERS[name].ep] > 0.5
    assert "run on the device | yes" in (artifact / "README.md").read_text()


def load_manifest(artifact: Path) -> Any:
    return json.loads((artifact / "manifest.json").read_text())


@pytest.mark.parametrize("target", ["qnn-npu", pytest.param("cuda-bf16", marks=pytest.mark.slow)])
def test_a_run_for_a_device_that_is_not_here_goes_to_its_end(
    tiny_model: Path, tmp_path: Path, tiny_rows: list[dict[str, Any]], target: str
) -> None:
    if status(load_target(target).provider).runs:
        pytest.skip("this machine has the device")
    write_jsonl(tmp_path / "rows.jsonl", tiny_rows)
    (tmp_path / "tiny.yaml").write_text(
        f"model: {{id: {tiny_model}}}\ndata: {{train: rows.jsonl, validation: {{auto: 0.25}}}}\n"
        f"train: {{rank: 4, max_steps: 1, batch_size: 4, evaluations: 1, samples: 0}}\n"
        f"export: {{target: {target}, max_length: 128}}\nverify: {{rows: 3, golden_tokens: 4, limits: {{top1_agreement: 0.5}}}}\n"
        "bench: {prompt_tokens: 16, new_tokens: 4}\n"
    )
    done = edgetune("run", "tiny.yaml", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["stages"]
    card = (tmp_path / "runs/tiny/artifact/README.md").read_text()
    assert "checked, not run on the device" in card and "bench" not in told
    if target == "qnn-npu":
        assert "the CPU stands in for it" in done.stderr and "bench: left out" in done.stderr
        found = json.loads((tmp_path / "runs/tiny/verify/report.json").read_text())
        assert found["device"]["ran"] is False and 0 < found["kld_mean"] < 0.05 and "KL divergence" in card
    else:
        assert "verify: left out" in done.stderr and "verify" not in told
    again = edgetune("run", "tiny.yaml", cwd=tmp_path)
    assert again.returncode == 0 and "left out" in again.stderr
