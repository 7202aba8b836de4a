"""Training and validation rows: no row on both sides."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edgetune.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    Keys = Sequence[Any] | np.ndarray


def split(keys: Keys, share: float, seed: int) -> list[bool]:
    """Draw validation rows.

    Args:
        keys: one per row, of one type that numpy sorts; rows with equal keys are identical and stay on one side.
        share: part of the rows that is wanted for validation, between 0 and 1.
        seed: the same seed and keys give the same rows.

    Returns:
        for each row, whether it is a validation row: at least one is, at least one is not, no more than
        the share (but for one group of identical rows where none is small enough).

    Raises:
        InputError: fewer than two different rows.
    """
    import numpy as np

    group = _groups(keys)
    sizes = np.bincount(group)
    if len(sizes) < 2:
        count = "one row" if len(keys) == 1 else f"{len(keys):,} rows that are all the same" if len(keys) else "no row"
        raise InputError(
            f"there is {count}: too little to take validation rows from",
            where="data.validation",
            fix="add rows, or name a validation file",
        )
    wanted = min(max(1, round(share * len(keys))), len(keys) - 1)
    drawn = array("q", range(len(sizes)))  # 8 bytes a row, where a list has 36
    random.Random(seed).shuffle(drawn)
    held_out = np.zeros(len(sizes), bool)
    taken = 0
    for number in drawn:
        if taken + sizes[number] <= wanted:
            taken += int(sizes[number])
            held_out[number] = True
    if not taken:
        held_out[min(drawn, key=lambda number: sizes[number])] = True
    return held_out[group].tolist()


def _groups(keys: Keys) -> np.ndarray:
    """For each row the number of its group of equal keys, counted in the order in which they first appear."""
    import numpy as np

    _, first, group = np.unique(np.asarray(keys), return_index=True, return_inverse=True)
    number = np.empty(len(first), np.int64)
    number[np.argsort(first)] = np.arange(len(first))
    return number[group]


def overlap(train: Keys, validation: Keys) -> list[bool]:
    """For each training row's key, whether a validation row has it too. Such rows leave the training side."""
    import numpy as np

    return np.isin(np.asarray(train), np.asarray(validation)).tolist()
