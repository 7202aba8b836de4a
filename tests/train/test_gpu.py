"""Training on a CUDA device: the same losses as on the CPU, every method learns. For `make gpu-check`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from edgetune.data.render import Encoded
from edgetune.models import load_model, load_tokenizer, resolve
from edgetune.recipe import ModelSection, TrainSection
from edgetune.train import attention
from edgetune.train.objective import Objective
from edgetune.train.trainer import Job, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]


def rows(count: int, start: int = 0) -> list[Encoded]:
    found = []
    for n in range(start, start + count):
        half = [5 + (n * 7 + k * 3) % 300 for k in range(6 + n % 5)]
        found.append(Encoded([*half, *half], [False] * len(half) + [True] * len(half)))
    return found


def test_loss_and_gradients_equal_the_cpu_s(tiny_model: Path) -> None:
    found = []
    for device in ("cpu", "cuda"):
        model = load_model(tiny_model, dtype=torch.float32).to(device).requires_grad_(True).train()
        attention.use(model)
        objective = Objective(model, 0, True)
        assert objective.prove(model, rows(4)) == []
        batch = {n: v.to(device) if torch.is_tensor(v) else v for n, v in objective.batch(rows(4)).items()}
        loss = objective.loss(model, batch)
        loss.backward()
        found.append((float(loss), torch.cat([p.grad.flatten().cpu() for p in model.parameters()])))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    assert float((found[0][1] - found[1][1]).norm()) < 1e-3 * float(found[0][1].norm())


@pytest.mark.parametrize("method", ["lora", "dora", "qlora", "full"])
def test_every_method_learns(tiny_model: Path, tmp_path: Path, method: str) -> None:
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    for name in ("report", "adapter"):
        (tmp_path / name).mkdir()
    base = resolve(ModelSection(id=str(tiny_model)))
    section: dict[str, Any] = {"method": method, "learning_rate": 0.01, "batch_size": 4, "epochs": 4, "evaluations": 2}
    job = Job(base, load_tokenizer(base.path), rows(16), rows(6, 100), 1, "k")
    report = train(
        TrainSection(**section),
        job,
        report=tmp_path / "report",
        adapter=tmp_path / "adapter",
        checkpoints=tmp_path / "ck",
        resume=False,
    )
    assert report["device"].startswith("cuda")
    assert report["validation"]["after"]["loss"] < report["validation"]["before"]["loss"]
