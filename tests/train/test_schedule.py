"""The order of the batches."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edgetune.train.schedule import schedule

LENGTHS = st.lists(st.integers(1, 500), min_size=1, max_size=200)


@given(LENGTHS, st.integers(1, 16), st.integers(0, 5))
def test_each_pass_holds_every_row_once(lengths: list[int], size: int, seed: int) -> None:
    one_pass = -(-len(lengths) // size)
    order = schedule(lengths, size, 3 * one_pass, seed)
    assert len(order) == 3 * one_pass
    for start in range(0, len(order), one_pass):
        assert sorted(row for batch in order[start : start + one_pass] for row in batch) == list(range(len(lengths)))
        assert all(0 < len(batch) <= size for batch in order)


@given(LENGTHS, st.integers(1, 16), st.integers(1, 40))
def test_a_longer_schedule_begins_with_the_shorter(lengths: list[int], size: int, count: int) -> None:
    assert schedule(lengths, size, count + 7, 1)[:count] == schedule(lengths, size, count, 1)


def test_seeds_differ_and_lengths_are_grouped() -> None:
    lengths = [n % 100 + 1 for n in range(1000)]
    assert schedule(lengths, 8, 50, 1) != schedule(lengths, 8, 50, 2)
    spread = [max(lengths[r] for r in batch) - min(lengths[r] for r in batch) for batch in schedule(lengths, 8, 125, 1)]
    assert sum(spread) / len(spread) < 10
