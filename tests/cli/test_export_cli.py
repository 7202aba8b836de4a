"""`edgetune export` as a user calls it: limits for targets that choose by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conftest import edgetune
from edgetune import standalone
from edgetune.cli.export import command

FOUND: dict[str, Any] = {
    "path": "artifact", "precision": "int4", "provider": "cpu", "size_mb": 1.0, "max_length": 16, "model_context": 16,
    "seconds": 1.0, "builder_peak_rss_mb": 1.0,
}  # fmt: skip


def test_limits_reach_the_export(monkeypatch: pytest.MonkeyPatch) -> None:
    sections = []
    monkeypatch.setattr(standalone, "export_model", lambda _model, _out, section, *_: sections.append(section) or FOUND)
    command(Path("m"), "cpu-auto", size_mb=100, decode_tokens_per_s=120, kld_mean=0.02, prefill_tokens_per_s=900)
    auto = sections[0].auto
    assert (auto.size_mb, auto.decode_tokens_per_s, auto.kld_mean, auto.prefill_tokens_per_s) == (100, 120, 0.02, 900)
    command(Path("m"), None)
    assert sections[1] == type(sections[1])()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--size-mb", "-1"], "--size-mb: input should be greater than 0"),
        (["--kld-mean", "nan"], "--kld-mean: "),
        (["--max-length", "3"], "--max-length: input should be greater than or equal to 16"),
        (["--target", "cpu-int8", "--size-mb", "100"], "the target cpu-int8 does not choose grids by limits"),
    ],
)
def test_wrong_limits_are_exit_2(tiny_model: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    done = edgetune("export", tiny_model, "--out", tmp_path / "out", *arguments)
    assert done.returncode == 2 and said in done.stderr and not (tmp_path / "out").exists()
