"""What a run closes with: a sample of the answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edgetune import registry
from edgetune.cli import app
from edgetune.run import Result
from edgetune.summary import summary

SAMPLES = [
    {
        "prompt": f"<|im_start|>user\n{'x ' * 100}How many?<|im_end|>\n",
        "reference": "Two.",
        "before": "Cats\nand",
        "after": "",
    },
    {"prompt": "And now?", "reference": "Three.", "before": "Dogs", "after": "Three."},
]
TRAIN: dict[str, Any] = {
    "validation": {"before": {"loss": 2.0}, "after": {"loss": 1.5}},
    "tokens_per_s": 100.0,
    "tokens": 1000,
    "steps": 3,
    "peak_rss_mb": 900.0,
}


def test_the_first_sample_is_in_the_table() -> None:
    done = {"train": "not done yet"}
    rows = dict(summary(Result(Path("runs/x"), "x.yaml", done, {"train": {**TRAIN, "samples": SAMPLES}})))
    assert rows["asked"].startswith("…") and rows["asked"].endswith("How many?<|im_end|>") and len(rows["asked"]) <= 100
    assert rows["answered before"] == "Cats and" and rows["answered after"] == "(nothing)"
    for none in ({}, {"samples": []}):
        assert "asked" not in dict(summary(Result(Path("runs/x"), "x.yaml", done, {"train": {**TRAIN, **none}})))


def test_runs_show_has_all_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    run = registry.Run(Path("/runs/x"), None, ["train"], None, 1, "now")
    monkeypatch.setattr(registry, "find_run", lambda name: run)
    monkeypatch.setattr(registry, "reports", lambda run: {"train": {**TRAIN, "samples": SAMPLES}})
    shown = CliRunner().invoke(app, ["runs", "show", "x"])
    assert "train: steps" in shown.stdout
    assert shown.stdout.endswith("2. prompt: And now?\n   - reference: Three.\n   - before: Dogs\n   - after: Three.\n")
