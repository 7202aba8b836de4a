"""Statistics against other formulas for the same: published t values, numpy, simulation."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetune.runtime.bench.statistics import interval, ratio, summary, t_quantile

NUMBERS = st.lists(st.floats(0.01, 1e6), min_size=2, max_size=30)


@pytest.mark.parametrize(
    ("df", "value"),
    [(1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622), (30, 2.0423), (120, 1.9799), (1e5, 1.95997)],
)
def test_t_is_that_of_the_tables(df: float, value: float):
    assert t_quantile(df) == pytest.approx(value, abs=1e-4)


def test_t_of_two_degrees_has_a_closed_form():
    for share in (0.6, 0.9, 0.995):
        a = 2 * share - 1
        assert t_quantile(2, share) == pytest.approx(a * math.sqrt(2 / (1 - a * a)), rel=1e-6)


@given(NUMBERS)
def test_summary_follows_numpy(values: list[float]):
    found = summary(values)
    array = np.array(values)
    for share in (50, 95, 99):
        assert found[f"p{share}"] == pytest.approx(np.percentile(array, share), rel=1e-6, abs=1e-4)
    assert found["std"] == pytest.approx(array.std(ddof=1), rel=1e-6, abs=1e-4)
    half = t_quantile(len(values) - 1) * array.std(ddof=1) / np.sqrt(len(values))
    assert found["ci95"] == pytest.approx([array.mean() - half, array.mean() + half], rel=1e-6, abs=1e-3)
    assert found["n"] == len(values)


def test_one_value_has_no_spread():
    found = summary([3.0])
    assert found["std"] is None and found["ci95"] is None and found["p99"] == found["mean"] == 3.0
    assert interval([1.0]) is None and ratio([2.0], [1.0], paired=True).low is None
    assert ratio([2.0], [1.0, 3.0], paired=False).low is None


def test_tokens_of_a_round_count_as_one():
    rounds = [[1.0] * 50, [2.0] * 50, [3.0] * 50]
    pooled = [value for part in rounds for value in part]
    wide = summary(pooled, [1.0, 2.0, 3.0])["ci95"]
    assert wide == pytest.approx([2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)], abs=1e-3)


def test_intervals_hold_the_truth_as_often_as_they_say():
    draw = random.Random(1)
    held = sum(low <= 10 <= high for low, high in (_interval(draw) for _ in range(2000)))
    assert 0.935 < held / 2000 < 0.965


def _interval(draw: random.Random) -> tuple[float, float]:
    found = interval([draw.gauss(10, 3) for _ in range(5)])
    assert found
    return found


@given(NUMBERS, st.floats(0.1, 10))
def test_ratio_of_pairs_knows_a_factor(values: list[float], factor: float):
    found = ratio([value * factor for value in values], values, paired=True)
    assert found.value == pytest.approx(factor) and found.low is not None and found.high is not None
    assert found.low == pytest.approx(factor, rel=1e-5) and found.high == pytest.approx(factor, rel=1e-5)
    other = ratio(values, [value * factor for value in values], paired=False)
    assert other.low is not None and other.high is not None
    assert other.low <= other.value * 1.0000001 and other.value <= other.high * 1.0000001


def test_pairs_take_out_what_drifts():
    drift = [1.0, 2.0, 4.0, 8.0]
    first, second = [1.1 * d for d in drift], [d * f for d, f in zip(drift, (1.01, 0.99, 1.0, 1.0), strict=True)]
    paired, apart = ratio(first, second, paired=True), ratio(first, second, paired=False)
    assert paired.low and paired.high and apart.low and apart.high
    assert paired.low > 1.05 and paired.high < 1.15 and apart.low < 1 < apart.high


def test_welch_against_its_formula():
    first, second = [10.0, 11.0, 12.5, 9.0], [8.0, 8.5, 7.0]
    a, b = np.log(first), np.log(second)
    parts = a.var(ddof=1) / 4, b.var(ddof=1) / 3
    df = sum(parts) ** 2 / (parts[0] ** 2 / 3 + parts[1] ** 2 / 2)
    half = t_quantile(df) * math.sqrt(sum(parts))
    found = ratio(first, second, paired=False)
    middle = a.mean() - b.mean()
    assert (found.value, found.low, found.high) == pytest.approx(tuple(np.exp([middle, middle - half, middle + half])))
