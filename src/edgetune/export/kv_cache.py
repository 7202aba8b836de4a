"""Scales of an int8 KV cache, calibrated on training rows.

Keys are cached after their rotation, so the model's own cache tells what must be held. The layout of the file is the
model builder's: one list a layer, a number a channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgetune.errors import InputError
from edgetune.files import write_json

LEAST_TOKENS = 256  # fewer do not show what keys and values may be
_MOST_ROWS, _MOST_TOKENS = 64, 512
_QMAX = 128  # int8
_ROOM = 1.1  # other rows may go a little further than these


def require_tokens(tokens: int, where: str = "data.train") -> None:
    """Raise InputError where calibration rows of so many tokens are too few; `where` is their place."""
    if tokens < LEAST_TOKENS:
        raise InputError(
            f"an int8 KV cache needs at least {LEAST_TOKENS} tokens of calibration rows, not {tokens}",
            where=where,
            fix="give more rows, or a target without `kv_cache: int8`",
        )


def write_scales(
    merged: Path, rows: Sequence[Sequence[int]], file: Path, *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Write the largest keys and values of each channel that calibration rows give, as scales.

    Args:
        merged: transformers folder.
        rows: token ids.
        file: JSON, for the builder's option `kv_cache_scale_file`.
        trust_remote_code: run code that the model's folder brings.

    Returns:
        The builder's options.

    Raises:
        InputError: too few tokens, or keys or values are not finite numbers.
    """
    import torch

    from edgetune.models import load_model
    from edgetune.models.quiet import quiet

    used = [list(row[:_MOST_TOKENS]) for row in rows[:_MOST_ROWS]]
    require_tokens(sum(map(len, used)))
    most: list[list[torch.Tensor]] = []
    with torch.inference_mode(), quiet():
        model = load_model(merged, dtype=torch.float32, trust_remote_code=trust_remote_code).eval()
        for row in used:
            layers = model(input_ids=torch.tensor([row]), use_cache=True).past_key_values.layers
            # (1, heads, tokens, head size) → a number a channel
            found = [[side.abs().amax((0, 2)).flatten() for side in (layer.keys, layer.values)] for layer in layers]
            most = [
                [torch.maximum(a, b) for a, b in zip(old, new, strict=True)]
                for old, new in zip(most or found, found, strict=True)
            ]
    if not all(side.isfinite().all() for layer in most for side in layer):
        raise InputError(
            "the model's keys or values are not finite numbers",
            where=merged,
            fix="copy the model again; if it was trained: train again with a lower train.learning_rate",
        )
    scales = [[(side * _ROOM / _QMAX).clamp(min=1e-8).tolist() for side in layer] for layer in most]
    keys, values = ([layer[which] for layer in scales] for which in (0, 1))
    write_json(file, {"scales": {"k_scales": keys, "v_scales": values}, "qmax": _QMAX})
    return {"kv_cache_quant_scheme": "int8_per_channel", "kv_cache_scale_file": str(file.absolute())}
