"""Validation: loss, perplexity and token accuracy over the tokens that carry loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from edgetune.data.batch import Encoded, sizes
from edgetune.train import distributed
from edgetune.train.objective import Objective
from edgetune.train.schedule import passes

_AT_A_TIME = 64  # rows that are cut into passes together


def evaluate(
    objective: Objective,
    model: Any,
    rows: Sequence[Encoded],
    pass_tokens: int,
    done: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Score `rows` with the model in evaluation mode.

    Args:
        objective: of the model.
        model: a causal language model; its training mode is restored afterwards.
        rows: encoded rows.
        pass_tokens: tokens a forward pass holds at most.
        done: called with the number of rows after each pass.

    Returns:
        `loss` (nats a learned token, each token weighing the same), `perplexity`, `token_accuracy`, `tokens`.
    """
    loss, correct, count = 0.0, 0, 0
    lengths, _ = sizes(rows)
    for start in range(0, len(rows), _AT_A_TIME):
        end = min(start + _AT_A_TIME, len(rows))
        own = distributed.share(passes(range(start, end), lengths, pass_tokens, distributed.place().size))
        for number, one in enumerate(own):
            found = objective.score(model, distributed.filled([rows[row] for row in one], rows))
            loss, correct, count = loss + found[0], correct + found[1], count + found[2]
            if done:
                done((end - start) * (number + 1) // len(own) - (end - start) * number // len(own))
    loss, right, tokens = distributed.total([loss, correct, count])
    mean = loss / tokens
    return {
        "loss": mean,
        "perplexity": math.exp(min(mean, 700.0)),
        "token_accuracy": right / tokens,
        "tokens": int(tokens),
    }
