"""The gate on an execution provider: the artifact's own, another one, a missing one; and what the card says afterwards.

The provider that is here is the CPU's under another name, so that the whole way of a real one is gone.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from artifacts import copy_of, seal, tiny_artifact  # noqa: F401
from conftest import edgetune, write_jsonl
from edgetune.errors import InputError
from edgetune.runtime import providers
from edgetune.runtime.artifact import open_artifact
from edgetune.standalone_verify import verify_artifact

CARD = """# tiny

## What was measured

| | |
|---|---|
| on the device | checked, not run on the device: run `edgetune verify` there |
| size | small |

## The rest
"""


@pytest.fixture
def rows(tmp_path: Path, tiny_rows: list[dict[str, Any]]) -> Path:
    return write_jsonl(tmp_path / "held_out.jsonl", tiny_rows[:3])


@pytest.fixture
def for_openvino(tiny_artifact: Path, tmp_path: Path) -> Path:  # noqa: F811
    folder = copy_of(tiny_artifact, tmp_path)
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["decoder"]["session_options"] = {"provider_options": [{"OpenVINO": {"device_type": "CPU"}}]}
    (folder / "genai_config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text(CARD)
    seal(folder)
    return folder


def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = replace(providers.PROVIDERS["openvino"], plugin="no_such_plugin")
    monkeypatch.setitem(providers.PROVIDERS, "openvino", gone)


def test_a_missing_provider_is_said_and_the_cpu_stands_in_only_when_asked(
    for_openvino: Path, tiny_model: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing(monkeypatch)
    with pytest.raises(InputError, match=r"OpenVINOExecutionProvider, which is not installed(.|\n)*--provider cpu"):
        verify_artifact(for_openvino, tiny_model, rows, None, {}, None)
    report = verify_artifact(for_openvino, tiny_model, rows, None, {}, None, provider="cpu")
    assert report["passed"]
    assert report["device"] == {
        "provider": "cpu", "architecture": "any", "ran": False, "shares": {"CPUExecutionProvider": 1.0},
    }  # fmt: skip
    assert "checked, not run on the device" in (for_openvino / "README.md").read_text()


def test_where_it_ran_stands_in_report_and_card(
    for_openvino: Path, tiny_model: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = replace(providers.PROVIDERS["openvino"], ep="CPUExecutionProvider", options=None)
    monkeypatch.setitem(providers.PROVIDERS, "openvino", here)
    for limits, gate in (({"kld_mean": 1e-30}, "NOT PASSED"), ({}, "passed")):
        report = verify_artifact(for_openvino, tiny_model, rows, None, limits, None)
        assert report["device"]["provider"] == "openvino" and report["device"]["ran"]
        card = (for_openvino / "README.md").read_text()
        assert f"| run on the device | yes, on openvino: KL mean {report['kld_mean']:.4f}" in card
        assert f"gate {gate}; nodes by provider: CPUExecutionProvider 100% |" in card
        assert (
            "not run on the device" not in card and "| size | small |\n" in card and card.endswith("\n\n## The rest\n")
        )
        assert card.count("| gate | ") == 1 and f"| gate | {gate}" in card
    open_artifact(for_openvino)  # the manifest knows the new card


def test_the_processor_that_it_is_for_is_a_device_too(
    tiny_artifact: Path,  # noqa: F811
    tiny_model: Path,
    tmp_path: Path,
    rows: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = copy_of(tiny_artifact, tmp_path)
    (folder / "README.md").write_text(CARD)
    seal(folder, options={"target": {"architecture": "arm64"}})
    for here, ran in (("x86-64", False), ("arm64", True)):
        monkeypatch.setattr("edgetune.export.verify.architecture", lambda here=here: here)
        report = verify_artifact(folder, tiny_model, rows, None, {}, None)
        assert (report["device"]["architecture"], report["device"]["ran"]) == ("arm64", ran)
        assert ("| run on the device | yes, on cpu, arm64: KL mean" in (folder / "README.md").read_text()) == ran


def test_a_provider_that_takes_nothing_is_no_success(for_openvino: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime gives every node to the CPU without a word."""
    nothing = replace(providers.PROVIDERS["openvino"], ep="AzureExecutionProvider", options=None)
    monkeypatch.setitem(providers.PROVIDERS, "openvino", nothing)
    monkeypatch.setattr(providers, "require", lambda *_: None)
    with pytest.raises(InputError, match="AzureExecutionProvider takes no node of the graph"):
        providers.open_session(for_openvino / "model.onnx", "openvino")


def test_wrong_providers(tiny_artifact: Path, tiny_model: Path, rows: Path) -> None:  # noqa: F811
    with pytest.raises(InputError, match=r"there is no provider `loihi`(.|\n)*one of cpu, cuda"):
        verify_artifact(tiny_artifact, tiny_model, rows, None, {}, None, provider="loihi")
    with pytest.raises(InputError, match="runs on PyTorch"):
        verify_artifact(tiny_model, tiny_model, rows, None, {}, None, provider="qnn")


def test_on_the_command_line(tiny_artifact: Path, tiny_model: Path, rows: Path) -> None:  # noqa: F811
    done = edgetune("verify", tiny_artifact, "--against", tiny_model, "--data", rows, "--provider", "dml")
    assert done.returncode == 2 and "needs the execution provider DmlExecutionProvider" in done.stderr
    assert not done.stdout and "Traceback" not in done.stderr
