"""The order of the batches: a pure function of the row lengths and the seed, so that resuming needs no state."""

from __future__ import annotations

import random
from collections.abc import Sequence

_POOL = 32  # batches that are drawn together and sorted by length, so that little is padding


def schedule(lengths: Sequence[int], batch_size: int, batches: int, seed: int) -> list[list[int]]:
    """Say which rows each batch holds.

    Args:
        lengths: tokens of each row.
        batch_size: rows a batch; the last one of a pass may hold fewer.
        batches: number of batches wanted, over as many passes as that takes.
        seed: of the order.

    Returns:
        `batches` lists of row numbers. Every pass holds each row once, in an order of its own; rows of similar
        length lie in one batch.
    """
    order: list[list[int]] = []
    epoch = 0
    while len(order) < batches:
        draw = random.Random(f"{seed}/{epoch}")
        rows = list(range(len(lengths)))
        draw.shuffle(rows)
        one_pass: list[list[int]] = []
        for start in range(0, len(rows), _POOL * batch_size):
            pool = sorted(rows[start : start + _POOL * batch_size], key=lambda row: -lengths[row])
            one_pass += [pool[at : at + batch_size] for at in range(0, len(pool), batch_size)]
        draw.shuffle(one_pass)
        order += one_pass
        epoch += 1
    return order[:batches]
