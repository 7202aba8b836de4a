"""Which rows a step learns from, and how they are cut into passes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetune.recipe import TrainSection
from edgetune.train.schedule import filled, passes, schedule, steps_a_pass

LENGTHS = st.lists(st.integers(1, 500), min_size=1, max_size=200)


@given(LENGTHS, st.integers(1, 16), st.integers(1, 3), st.integers(0, 5))
def test_each_pass_over_the_rows_holds_every_row_once(lengths: list[int], size: int, times: int, seed: int) -> None:
    section = TrainSection(batch_size=size, gradient_accumulation=times, epochs=3)
    a_pass = math.ceil(len(lengths) / (size * times))
    assert steps_a_pass(lengths, section, seed) == a_pass
    steps = schedule(lengths, section, seed)
    assert len(steps) == 3 * a_pass
    for start in range(0, len(steps), a_pass):
        rows = [row for step in steps[start : start + a_pass] for row in step.tolist()]
        assert sorted(rows) == list(range(len(lengths)))
    assert all(0 < len(step) <= size * times for step in steps)


@given(LENGTHS, st.integers(8, 1000), st.integers(0, 5))
def test_a_token_budget_is_kept_and_used(lengths: list[int], budget: int, seed: int) -> None:
    steps = schedule(lengths, TrainSection(batch_tokens=budget), seed)
    assert sorted(row for step in steps for row in step.tolist()) == list(range(len(lengths)))
    sums = [sum(lengths[row] for row in step) for step in steps]
    assert all(total <= budget or len(step) == 1 for total, step in zip(sums, steps, strict=True))
    for total, after in zip(sums, steps[1:], strict=False):
        assert total + lengths[after[0]] > budget


@given(LENGTHS, st.integers(1, 16), st.integers(1, 40))
def test_a_longer_schedule_begins_with_the_shorter(lengths: list[int], size: int, count: int) -> None:
    longer = schedule(lengths, TrainSection(batch_size=size, max_steps=count + 7), 1)
    shorter = schedule(lengths, TrainSection(batch_size=size, max_steps=count), 1)
    assert [step.tolist() for step in longer[:count]] == [step.tolist() for step in shorter]


def test_seeds_differ_and_a_part_of_an_epoch_is_rounded_up() -> None:
    lengths = [n % 100 + 1 for n in range(1000)]
    first, second = (schedule(lengths, TrainSection(), seed) for seed in (1, 2))
    assert first[0].tolist() != second[0].tolist()
    assert len(first) == 125
    assert len(schedule(lengths, TrainSection(epochs=0.1), 1)) == 13


@given(LENGTHS, st.integers(8, 2000), st.integers(1, 4))
def test_passes_hold_each_row_once_within_the_budget(lengths: list[int], budget: int, processes: int) -> None:
    cut = passes(range(len(lengths)), lengths, budget, processes)
    assert len(cut) % processes == 0
    assert sorted(row for one in cut for row in one) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in one) <= budget or len(one) == 1 for one in cut)
    assert cut == passes(list(reversed(range(len(lengths)))), lengths, budget, processes)  # whatever order they come in


def test_passes_are_of_similar_size() -> None:
    lengths = [100, 200, 300, 400, 500, 600, 700, 800]
    sizes = [sum(lengths[row] for row in one) for one in passes(range(8), lengths, 2048)]
    assert sizes == [pytest.approx(1800, abs=100)] * 2


@given(st.integers(1, 100_000))
def test_passes_are_filled_up_to_few_sizes(tokens: int) -> None:
    more = filled(tokens)
    assert tokens <= more < tokens * 17 / 16 + 1 and filled(more) == more


def test_there_are_sixteen_sizes_between_powers_of_two() -> None:
    assert len({filled(tokens) for tokens in range(1025, 2049)}) == 16


def test_no_pass_is_empty_while_one_process_trains() -> None:
    assert sorted(passes([0, 1, 2], [100, 120, 90], 16)) == [[0], [1], [2]]
