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


def learned_logits(model: Any, inputs: dict[str, Any]) -> tuple[Any, Any]:
    """Run the model, and its head only at the columns of the batch where some row carries loss.

    Args:
        model: a causal language model.
        inputs: `input_ids`, `attention_mask`, `labels`, each (B, S) int64; -100 where nothing is learned.

    Returns:
        Logits (N, V), float32, and targets (N,), int64, of the N tokens that carry loss.
    """
    labels = inputs["labels"][:, 1:]
    keep = labels != -100
    columns = keep.any(0).nonzero().flatten()
    rest = {name: value for name, value in inputs.items() if name != "labels"}
    logits = model(**rest, logits_to_keep=columns, use_cache=False).logits
    chosen = keep[:, columns]
    return logits[chosen].float(), labels[:, columns][chosen]


def evaluate(
    model: Any,
    rows: Sequence[Encoded],
    pad_id: int,
    batch_size: int,
    done: Callable[[int], None] | None = None,
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
            logits, targets = learned_logits(model, inputs)
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
