"""What a training takes is counted, and passes are chosen to fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from edgetune.data.render import Encoded
from edgetune.errors import InputError
from edgetune.models import load_model
from edgetune.recipe import TrainSection
from edgetune.train import attention, memory
from edgetune.train.objective import Objective


@pytest.fixture
def model(tiny_model: Path) -> Any:
    return load_model(tiny_model, dtype=torch.float32).requires_grad_(True).train()


@pytest.fixture
def objective(model: Any) -> Objective:
    assert attention.use(model)
    return Objective(model, 0, True)


def row(length: int) -> Encoded:
    return Encoded([1 + n % 300 for n in range(length)], [True] * length)


def test_the_estimate_is_what_autograd_keeps(objective: Objective, model: Any) -> None:
    found = memory.activations(objective, model)
    for length in (100, 250, 500):
        kept = memory._kept(objective, model, row(length))
        assert kept == pytest.approx(found.of(length, length), rel=0.1)
    assert found.of(400, 100) < found.of(400, 400)  # short rows have fewer pairs of tokens


def test_counting_draws_nothing_and_leaves_the_mode(objective: Objective, model: Any) -> None:
    model.eval()
    before = torch.random.get_rng_state()
    memory.activations(objective, model)
    assert torch.equal(before, torch.random.get_rng_state()) and not model.training
    assert all(p.grad is None for p in model.parameters())


def test_passes_shrink_then_activations_are_computed_twice_then_it_is_refused(
    objective: Objective, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = memory.activations(objective, model)
    fixed = memory.optimizer_bytes(TrainSection(), model.num_parameters(), 1)

    def with_room(room: float, section: TrainSection, longest: int) -> memory.Fit:
        monkeypatch.setattr(memory, "free", lambda section, model: fixed + room / memory._SHARE)
        return memory.fit(section, objective, model, longest)

    assert with_room(2 * each.of(2048, 100), TrainSection(), 100) == memory.Fit(2048, False, None)
    half = with_room(0.6 * each.of(2048, 100), TrainSection(), 100)
    assert half.pass_tokens == 1024 and not half.checkpointing and half.why and "1024 tokens a pass" in half.why
    given = with_room(0.6 * each.of(2048, 100), TrainSection(pass_tokens=4000), 100)
    assert given == memory.Fit(4000, False, None)
    with pytest.raises(InputError, match=r"data\.max_length: training does not fit"):
        with_room(0.6 * each.of(600, 600), TrainSection(gradient_checkpointing=False), 600)
    twice = with_room(0.6 * each.of(600, 600), TrainSection(), 600)
    assert twice.checkpointing and twice.why and "longest row (600 tokens)" in twice.why
    with pytest.raises(InputError, match="training does not fit"):
        with_room(1000.0, TrainSection(), 600)


def test_computing_twice_gives_the_same_gradients(objective: Objective, model: Any) -> None:
    def gradients() -> torch.Tensor:
        model.zero_grad()
        objective.loss(model, objective.batch([row(50), row(70)])).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    once, kept = gradients(), memory._kept(objective, model, row(200))
    memory.compute_twice(model)
    assert torch.equal(once, gradients())
    assert memory._kept(objective, model, row(200)) < kept / 2
