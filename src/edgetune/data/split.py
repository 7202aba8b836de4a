"""Training and validation rows: no row on both sides."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence

from edgetune.errors import InputError


def split(keys: Sequence[Hashable], share: float, seed: int) -> list[bool]:
    """Draw validation rows.

    Args:
        keys: one per row; rows with equal keys are identical and stay on one side.
        share: part of the rows that is wanted for validation, between 0 and 1.
        seed: the same seed and keys give the same rows.

    Returns:
        for each row, whether it is a validation row: at least one is, at least one is not, no more than
        the share (but for one group of identical rows where none is small enough).

    Raises:
        InputError: fewer than two different rows.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    if len(groups) < 2:
        count = "one row" if len(keys) == 1 else f"{len(keys):,} rows that are all the same" if keys else "no row"
        raise InputError(
            f"there is {count}: too little to take validation rows from",
            where="data.validation",
            fix="add rows, or name a validation file",
        )
    wanted = min(max(1, round(share * len(keys))), len(keys) - 1)
    drawn = list(groups.values())
    random.Random(seed).shuffle(drawn)
    held_out = [False] * len(keys)
    taken = 0
    for rows in drawn:
        if taken + len(rows) <= wanted:
            taken += len(rows)
            for index in rows:
                held_out[index] = True
    if not taken:
        for index in min(drawn, key=len):
            held_out[index] = True
    return held_out


def overlap(train: Sequence[Hashable], validation: Sequence[Hashable]) -> list[bool]:
    """For each training row's key, whether a validation row has it too. Such rows leave the training side."""
    known = set(validation)
    return [key in known for key in train]
