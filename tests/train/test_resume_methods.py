"""Resuming is exact with every method: interrupted after a checkpoint and resumed gives the bits of uninterrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgetune.data.render import Encoded
from edgetune.export.quantize.grid import Grid
from edgetune.export.quantize.plan import Plan
from edgetune.models import load_tokenizer, resolve
from edgetune.recipe import ModelSection, TrainSection
from edgetune.train.checkpoints import Checkpoints
from edgetune.train.trainer import Job, train

STEPS = {"max_steps": 4, "evaluations": 2, "batch_size": 4, "learning_rate": 5e-3, "samples": 0, "dtype": "float32"}
GRIDS = Plan(Grid(4, 16, True), {}, "min_max")
ADAPTER = {"rank": 4, **STEPS}
METHODS: dict[str, dict[str, Any]] = {
    "noise and dropout": {**ADAPTER, "neftune_alpha": 5.0, "dropout": 0.1, "lora_plus_ratio": 4.0},
    "pissa": {**ADAPTER, "initialization": "pissa"},
    "eva": {**ADAPTER, "initialization": "eva"},
    "bfloat16 head": {**ADAPTER, "modules_to_save": ["lm_head"], "dtype": "bfloat16"},
    "dora": {**ADAPTER, "method": "dora", "optimizer": "adafactor"},
    "loftq": {**ADAPTER, "method": "qlora", "initialization": "loftq", "optimizer": "adamw_8bit"},
    "quantization aware": {**ADAPTER, "quantization_aware": True, "dtype": "bfloat16", "learning_rate": 2e-2},
    "full": {**STEPS, "method": "full", "weight_decay": 0.1, "learning_rate": 1e-3},
}


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("name", METHODS)
def test_resumed_is_uninterrupted(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    rows = [Encoded([3 + (n * 31 + k * k) % 370 for k in range(12 + n % 5)], [True] * (12 + n % 5)) for n in range(20)]
    base = resolve(ModelSection(id=str(tiny_model)))
    job = Job(
        base=base, tokenizer=load_tokenizer(base.path), train=rows, validation=rows[:4], seed=1, key="k", grids=GRIDS
    )

    def trained(folder: Path, resume: bool) -> dict[str, bytes]:
        for part in ("report", "adapter"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        outputs = {"report": folder / "report", "adapter": folder / "adapter", "checkpoints": folder / "ck"}
        report = train(TrainSection(**METHODS[name]), job, **outputs, resume=resume)
        assert report["best_step"] == 4  # else what follows would compare the checkpoint's own weights
        return {file.name: file.read_bytes() for file in (folder / "adapter").glob("*.safetensors")}

    wanted = trained(tmp_path / "whole", False)
    real = Checkpoints.complete

    def complete(self: Checkpoints, step: int) -> None:
        real(self, step)
        raise Interrupted

    monkeypatch.setattr(Checkpoints, "complete", complete)
    with pytest.raises(Interrupted):
        trained(tmp_path / "broken", False)
    monkeypatch.setattr(Checkpoints, "complete", real)
    assert [path.name for path in (tmp_path / "broken/ck").glob("checkpoint-*")] == ["checkpoint-2"]
    assert trained(tmp_path / "broken", True) == wanted
