"""`edgetune export` as a user calls it: limits for targets that choose by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conftest import edgetune
from edgetune import standalone
from edgetune.cli.export import command
from edgetune.errors import GateError
from edgetune.export.package import _too_large
from edgetune.export.targets import load_target
from edgetune.recipe import AutoSection

FOUND: dict[str, Any] = {
    "path": "artifact", "precision": "int4", "provider": "cpu", "size_mb": 1.0, "max_length": 16, "model_context": 16,
    "seconds": 1.0, "builder_peak_rss_mb": 1.0, "failures": [], "device": {"ran": True},
}  # fmt: skip
ELSEWHERE: dict[str, Any] = {
    "provider": "qnn", "architecture": "any", "ran": False, "why_not": "is not installed", "ran_on_cpu": True,
    "prepare_failed": "too large",
}  # fmt: skip


def test_limits_reach_the_export(monkeypatch: pytest.MonkeyPatch) -> None:
    sections = []
    monkeypatch.setattr(standalone, "export_model", lambda _model, _out, section, *_: sections.append(section) or FOUND)
    command(Path("m"), "cpu-auto", size_mb=100, decode_tokens_per_s=120, kld_mean=0.02, prefill_tokens_per_s=900)
    auto = sections[0].auto
    assert (auto.size_mb, auto.decode_tokens_per_s, auto.kld_mean, auto.prefill_tokens_per_s) == (100, 120, 0.02, 900)
    command(Path("m"), None)
    assert sections[1] == type(sections[1])()


def test_a_device_that_is_not_here_is_told_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = {"matrices": 9, "vectors": 5}
    found = {**FOUND, "device": ELSEWHERE, "weights": weights}
    monkeypatch.setattr(standalone, "export_model", lambda *_: found)
    command(Path("m"), "qnn-npu")
    said = " ".join(capsys.readouterr().out.split())
    assert "not run: the provider qnn is not installed" in said and "9 matrices and 5 norms and biases" in said
    assert "compiled for it not: too large" in said
    assert "next, on the device edgetune verify artifact --against m --data FILE" in said
    assert "next, here edgetune verify artifact --provider cpu --against m --data FILE" in said
    found["device"] = {**ELSEWHERE, "ran_on_cpu": False, "cpu_says": "no such kernel"}
    command(Path("m"), "qnn-npu")
    said = " ".join(capsys.readouterr().out.split())
    assert "on the CPU not run: no such kernel" in said and "next, here" not in said


def test_an_artifact_over_the_size_that_was_asked_for_is_exit_3(monkeypatch: pytest.MonkeyPatch) -> None:
    section = load_target("cpu-auto").quantization
    assert section is not None
    asked = {"quantization": section.model_copy(update={"auto": AutoSection(size_mb=100)})}
    failures = _too_large(load_target("cpu-auto").model_copy(update=asked), 100.5)
    assert failures == ["size_mb 100.500 is over 100"] and _too_large(load_target("cpu-int4"), 1e9) == []
    found = {**FOUND, "size_mb": 100.5, "failures": failures, "quantization": {"auto": {"limits": {"size_mb": 100}}}}
    monkeypatch.setattr(standalone, "export_model", lambda *_: found)
    for json in (False, True):
        with pytest.raises(GateError, match=r"100\.500 is over 100(.|\n)*size_mb=99\.450"):
            command(Path("m"), "cpu-auto", json=json)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--size-mb", "-1"], "--size-mb: input should be greater than 0"),
        (["--kld-mean", "nan"], "--kld-mean: "),
        (["--max-length", "3"], "--max-length: input should be greater than or equal to 16"),
        (["--target", "cpu-int8", "--size-mb", "100"], "the target cpu-int8 does not choose grids by limits"),
        (["--target", "cpu-int8", "--points", "points.json"], "the target cpu-int8 does not choose grids by limits"),
    ],
)
def test_wrong_limits_are_exit_2(tiny_model: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    done = edgetune("export", tiny_model, "--out", tmp_path / "out", *arguments)
    assert done.returncode == 2 and said in done.stderr and not (tmp_path / "out").exists()
