"""Validation: loss, perplexity and token accuracy over the tokens that carry loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from edgetune.data.batch import Encoded, collate


def batches(rows: Sequence[Encoded], size: int) -> Iterator[list[Encoded]]:
    """Rows in batches of similar length, so that little is padding."""
    ordered = sorted(rows, key=lambda row: len(row.ids))
    return (ordered[start : start + size] for start in range(0, len(ordered), size))


def evaluate(
    model: Any, rows: Sequence[Encoded], pad_id: int, batch_size: int, done: Callable[[int], None] | None = None
) -> dict[str, float]:
    """Score `rows` with the model in evaluation mode.

    Args:
        model: a causal language model; its training mode is restored afterwards.
        rows: encoded rows.
        pad_id: token that fills up a batch.
        batch_size: rows a forward pass.
        done: called with the number of rows after each batch.

    Returns:
        `loss` (nats a learned token, each token weighing the same), `perplexity`, `token_accuracy`, `tokens`.
    """
    import torch

    was_training = model.training
    model.eval()
    loss, correct, count = 0.0, 0, 0
    with torch.inference_mode():
        for batch in batches(rows, batch_size):
            inputs = {name: torch.from_numpy(value).to(model.device) for name, value in collate(batch, pad_id).items()}
            labels = inputs.pop("labels")[:, 1:]
            keep = labels != -100
            logits = model(**inputs, use_cache=False).logits[:, :-1][keep].float()
            targets = labels[keep]
            loss += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
            correct += int((logits.argmax(-1) == targets).sum())
            count += targets.numel()
            if done:
                done(len(batch))
    model.train(was_training)
    mean = loss / count
    return {
        "loss": mean,
        "perplexity": math.exp(min(mean, 700.0)),
        "token_accuracy": correct / count,
        "tokens": count,
    }
