"""Which rows an optimizer step learns from, and how they are cut into forward passes.

Both are pure functions of the row lengths, the recipe and the seed: resuming needs no state, and every process of a
distributed training knows the share of all others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from edgetune.recipe import TrainSection

DEFAULT_ROWS = 8
DEFAULT_PASS_TOKENS = 2048


def schedule(lengths: Sequence[int] | np.ndarray, section: TrainSection, seed: int) -> list[np.ndarray]:
    """The rows of each optimizer step.

    Args:
        lengths: tokens of each row.
        section: says how much a step holds (`batch_size` rows or `batch_tokens`, times `gradient_accumulation`) and
            how many there are (`max_steps`, else `epochs`).
        seed: of the order.

    Returns:
        an array of row numbers a step. Every pass over the rows holds each once, in an order of its own; its last
        step may hold fewer.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    steps: list[np.ndarray] = []
    wanted, epoch = section.max_steps or math.inf, 0
    while len(steps) < wanted:
        one_pass = _one_pass(sizes, section, np.random.default_rng([seed, epoch]))
        if section.max_steps is None and epoch == 0:
            wanted = max(1, math.ceil(section.epochs * len(one_pass)))
        steps += one_pass
        epoch += 1
    return steps[: int(wanted)]


def steps_a_pass(lengths: Sequence[int] | np.ndarray, section: TrainSection, seed: int) -> int:
    """Optimizer steps in the first pass over the rows."""
    return len(_one_pass(np.asarray(lengths, dtype=np.int64), section, np.random.default_rng([seed, 0])))


def _one_pass(sizes: np.ndarray, section: TrainSection, draw: np.random.Generator) -> list[np.ndarray]:
    order = draw.permutation(len(sizes))
    if section.batch_tokens is None:
        rows = (section.batch_size or DEFAULT_ROWS) * section.gradient_accumulation
        return [order[start : start + rows] for start in range(0, len(order), rows)]
    budget, ends, held = section.batch_tokens * section.gradient_accumulation, [], 0
    for place, size in enumerate(sizes[order].tolist()):
        if held and held + size > budget:
            ends.append(place)
            held = 0
        held += size
    return np.split(order, ends)


def passes(
    rows: Sequence[int] | np.ndarray, lengths: Sequence[int] | np.ndarray, budget: int, processes: int = 1
) -> list[list[int]]:
    """Cut a step into forward passes of similar size.

    Args:
        rows: row numbers of the step.
        lengths: tokens of every row of the file.
        budget: tokens a pass holds at most; a longer row goes alone.
        processes: the number of passes is a multiple of this.

    Returns:
        row numbers of each pass; pass i is for process i % processes. Passes are empty where there are fewer rows.
    """
    longest_first = sorted((int(row) for row in rows), key=lambda row: (-int(lengths[row]), row))
    total = sum(int(lengths[row]) for row in longest_first)
    count = max(1, min(len(longest_first), math.ceil(total / budget)))
    while True:
        count = math.ceil(count / processes) * processes
        found: list[list[int]] = [[] for _ in range(count)]
        held = [0] * count
        for row in longest_first:
            least = held.index(min(held))
            found[least].append(row)
            held[least] += int(lengths[row])
        if all(size <= budget or len(one) == 1 for size, one in zip(held, found, strict=True)):
            return found
        count += 1


def filled(tokens: int) -> int:
    """Tokens that a packed pass of `tokens` is filled up to: the next of 16 sizes to the next power of two.

    Libraries keep code for each size of a product that they meet; making it takes longer than some tokens more.
    """
    step = max(1, (1 << max(0, tokens - 1).bit_length()) // 32)
    return -(-tokens // step) * step
