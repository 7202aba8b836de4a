"""The split's promises, for any rows."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetune.data.split import overlap, split
from edgetune.errors import InputError

KEYS = st.lists(st.integers(0, 8), min_size=2, max_size=60).filter(lambda keys: len(set(keys)) > 1)
SHARES = st.floats(0.001, 0.999)


@given(keys=KEYS, share=SHARES, seed=st.integers(0, 2**31 - 1))
def test_promises(keys: list[int], share: float, seed: int) -> None:
    held_out = split(keys, share, seed)
    train = [key for key, held in zip(keys, held_out, strict=True) if not held]
    validation = [key for key, held in zip(keys, held_out, strict=True) if held]
    assert train
    assert validation
    assert not set(train) & set(validation)
    assert held_out == split(keys, share, seed)
    assert len(validation) <= max(1, round(share * len(keys))) or len(set(validation)) == 1


@given(count=st.integers(2, 300), share=SHARES, seed=st.integers(0, 100))
def test_different_rows_give_exactly_the_share(count: int, share: float, seed: int) -> None:
    assert sum(split(range(count), share, seed)) == min(max(1, round(share * count)), count - 1)


def test_another_seed_draws_other_rows() -> None:
    assert split(range(100), 0.1, 1) != split(range(100), 0.1, 2)


@pytest.mark.parametrize(
    ("keys", "words"), [([], "no row"), ([1], "one row"), ([1, 1, 1], "3 rows that are all the same")]
)
def test_too_few_rows(keys: list[int], words: str) -> None:
    with pytest.raises(InputError, match=words):
        split(keys, 0.5, 0)


def plainly(keys: list[int], share: float, seed: int) -> list[bool]:
    """The draw in lists and dictionaries: which rows it takes must never change for a seed."""
    groups: dict[int, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    wanted = min(max(1, round(share * len(keys))), len(keys) - 1)
    drawn = list(groups.values())
    random.Random(seed).shuffle(drawn)
    taken: list[int] = []
    for rows in drawn:
        taken += rows if len(taken) + len(rows) <= wanted else []
    chosen = set(taken or min(drawn, key=len))
    return [index in chosen for index in range(len(keys))]


@given(keys=KEYS, share=SHARES, seed=st.integers(0, 2**31 - 1))
def test_the_draw_is_the_one_that_it_always_was(keys: list[int], share: float, seed: int) -> None:
    assert split(keys, share, seed) == plainly(keys, share, seed)
    assert split([f"{key:016}".encode() for key in keys], share, seed) == plainly(keys, share, seed)


def test_overlap_marks_training_rows() -> None:
    assert overlap([1, 2, 1, 3], [1, 9]) == [True, False, True, False]
