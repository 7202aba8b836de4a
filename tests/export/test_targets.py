"""Targets."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgetune.errors import InputError
from edgetune.export.targets import load_target, names


def test_the_shipped_targets_load() -> None:
    assert {"cpu-fp32", "cpu-int8", "cpu-int4"} <= set(names())
    for name in names():
        assert load_target(name).description and load_target(name).needs


def test_unknown_names_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean `cpu-int8`"):
        load_target("cpu-int88")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("precision: int3\nprovider: cpu\ndescription: x\nneeds: y\n", "precision"),
        ("precision: int8\nprovider: cpu\ndescription: x\n", "needs"),
        ("precision: int8\nprovider: cpu\ndescription: x\nneeds: y\nextra: 1\n", "extra"),
        ("a: [", "YAML"),
        ("", "input"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        load_target(str(path))
