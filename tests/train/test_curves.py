"""What is said of curves, on curves that are made up."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetune.train.curves import remarks, spike

Row = dict[str, Any]


def trained(losses: list[float], start: int = 1) -> list[Row]:
    return [{"step": start + at, "loss": loss, "grad_norm": 1.0, "tokens": 100} for at, loss in enumerate(losses)]


def curve(training: list[float], validation: dict[int, float]) -> list[Row]:
    """Rows of metrics.jsonl in the order in which they are written."""
    rows = [
        *trained(training),
        *({"step": step, "validation_loss": loss} for step, loss in validation.items()),
    ]
    return sorted(rows, key=lambda row: (row["step"], "validation_loss" in row))


def falling(first: float, last: float, steps: int, noise: float = 0.0, seed: int = 0) -> list[float]:
    """An exponential approach, with noise that is as skewed as that of small batches."""
    draw = random.Random(seed)
    return [(last + (first - last) * math.exp(-4 * at / steps)) * math.exp(draw.gauss(0, noise)) for at in range(steps)]


GOOD = {0: 1.90, 25: 1.80, 50: 1.74, 75: 1.715, 100: 1.70}


def test_a_good_curve_gets_no_remark() -> None:
    for noise in (0.0, 0.1, 0.4):
        assert remarks(curve(falling(1.9, 1.6, 100, noise), GOOD)) == []
    assert remarks(curve(falling(1.9, 1.8, 15), {0: 1.882, 8: 1.82, 15: 1.80})) == []
    assert remarks(curve([1.9], {0: 1.9, 1: 1.89})) == []


def test_a_last_validation_that_is_a_little_worse_is_no_overfitting() -> None:
    assert remarks(curve(falling(1.9, 1.2, 100), {**GOOD, 100: 1.72})) == []


def test_overfitting_is_said_with_steps_and_numbers() -> None:
    rows = curve(falling(1.9, 0.4, 100), {0: 1.9, 25: 1.75, 50: 1.70, 75: 1.85, 100: 2.10})
    (said,) = remarks(rows)
    assert "overfitting: validation loss rose from 1.700 (step 50) to 2.100 (step 100)" in said
    assert "checkpoint of step 50 was kept" in said and "train.max_steps=50" in said
    before, after = said.split("loss fell from ")[1].split(". ")[0].split(" to ")
    assert 0.4 < float(after) < 0.6 < float(before) < 0.9


def test_validation_that_rises_with_training_loss_is_not_called_overfitting() -> None:
    said = remarks(curve(falling(1.9, 2.6, 100), {0: 1.9, 25: 1.85, 50: 1.95, 75: 2.2, 100: 2.4}))
    assert not any("overfitting" in text for text in said)


def test_still_falling_asks_for_more_steps() -> None:
    (said,) = remarks(curve([2.5 - at / 100 for at in range(100)], {0: 2.5, 25: 2.25, 50: 2.0, 75: 1.75, 100: 1.5}))
    assert "still falling" in said and "1.750 at step 75" in said and "1.500 at step 100" in said


@pytest.mark.parametrize(
    ("training", "last", "cure"),
    [
        ([1.9] * 40, 1.901, "raise train.learning_rate"),
        (falling(1.9, 1.0, 40), 1.905, "more rows"),
        (falling(1.9, 5.0, 40), 4.0, "lower train.learning_rate"),
    ],
)
def test_no_learning_names_the_likely_cause(training: list[float], last: float, cure: str) -> None:
    said = remarks(curve(training, {0: 1.9, 20: last, 40: last + 0.001}))
    assert "never fell below the base model's 1.900" in said[0] and cure in said[0]


def test_a_plateau_over_half_of_the_steps() -> None:
    flat = {0: 1.9, 10: 1.75, 20: 1.7, 30: 1.7001, 40: 1.6999, 50: 1.7001, 60: 1.7}
    (said,) = remarks(curve(falling(1.9, 1.65, 60), flat))
    assert "stands at 1.700 since step 30 of 60" in said


def test_jumps_are_told_once_there_are_several() -> None:
    losses = [1.9 + 0.02 * (at % 5) for at in range(120)]
    for at in (40, 70, 71, 100):
        losses[at] = 4.5
    (said,) = remarks(curve(losses, {0: 2.0, 60: 1.9, 120: 1.85}))
    assert "jumped 3 times (steps 41, 71, 101; up to 4.500" in said and "train.learning_rate" in said
    losses[100] = 1.9
    assert remarks(curve(losses, {0: 2.0, 60: 1.9, 120: 1.85})) == []


odd = st.one_of(st.none(), st.text(max_size=2), st.floats(), st.integers(-5, 10**12), st.booleans())
row = st.dictionaries(st.sampled_from(["step", "loss", "validation_loss", "grad_norm"]), odd)
plain = st.fixed_dictionaries(
    {"step": st.integers(0, 60)}, optional={"loss": st.floats(0, 50), "validation_loss": st.floats(0, 50)}
)


@settings(max_examples=300, deadline=None)
@given(st.lists(row, max_size=40) | st.lists(plain, max_size=90))
def test_nothing_raises(rows: list[Row]) -> None:
    assert all(isinstance(text, str) for text in remarks(rows))
    spike(rows)


@settings(max_examples=100, deadline=None)
@given(st.floats(1.0, 4.0), st.floats(0.5, 0.98), st.integers(20, 400))
def test_no_remark_on_any_smooth_good_curve(first: float, share: float, steps: int) -> None:
    """Falls fast, then flat but not quite: as a schedule that ends at zero gives."""
    at = [round(steps * part / 4) for part in range(5)]
    course = {step: first * (share + (1 - share) * math.exp(-4 * step / steps)) for step in at}
    assert remarks(curve(falling(first, first * share, steps), course)) == []


def test_divergence_is_seen_within_a_few_steps() -> None:
    usual = falling(2.0, 1.5, 80, noise=0.15)
    rows = [{"step": 0, "validation_loss": 2.0}, *trained(usual)]
    assert spike(rows) is None
    away = trained([4.0, 5.5, 6.0, 6.5, 7.0], start=81)
    assert spike([*rows, *away[:4]]) is None
    found = spike([*rows, *away])
    assert found and found.step == 81 and found.steps == 5 and found.loss == 6.0
    assert "step 81" in found.text() and "6.000" in found.text()
    assert spike([*rows, *away[:3], *trained([1.5, 1.6], start=84)]) is None, "it came back by itself"


def test_divergence_before_there_is_a_usual_loss() -> None:
    rows = [{"step": 0, "validation_loss": 2.0}, *trained([2.0, 2.1, 2.6, 4.0, 6.0] + [7.5] * 30)]
    seen = next(at for at in range(len(rows)) if spike(rows[:at]))
    assert rows[seen - 1]["step"] <= 25
    assert spike([{"step": 0, "validation_loss": 7.0}, *rows[1:]]) is None, "the base was as bad"


def test_a_slow_climb_is_divergence_too() -> None:
    climbing = [1.5] * 60 + [1.5 * 1.04**at for at in range(60)]
    assert any(spike(trained(climbing[:at])) for at in range(len(climbing)))


def test_noise_of_small_batches_is_no_divergence() -> None:
    """200 trainings of 400 steps with noise from none to wild, heavy tails, and rows of two kinds."""
    draw = random.Random(7)
    for run in range(200):
        noise = draw.choice([0.05, 0.2, 0.5, 1.0])
        losses = []
        for at in range(400):
            loss = (0.3 + 1.5 * math.exp(-at / 100)) * math.exp(draw.gauss(0, noise))
            if draw.random() < 0.05:
                loss *= draw.uniform(2, 10)
            if run % 2 and draw.random() < 0.4:
                loss += 2.0
            losses.append(loss)
        rows = [{"step": 0, "validation_loss": 1.8}, *trained(losses)]
        alarms = [at for at in range(25, len(rows)) if spike(rows[:at])]
        assert alarms == [], (run, noise, alarms)


def test_a_loss_that_was_learned_by_heart_may_move() -> None:
    assert spike(trained([0.01] * 60 + [0.05, 0.08, 0.2, 0.3, 0.2])) is None
