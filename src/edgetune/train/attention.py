"""Attention over rows that lie one behind the other in one sequence, each seeing only itself.

No mask and no padding exist: each row's products are computed by themselves, in blocks of queries that only meet the
keys they may see, for all query heads of a key head at once. The forward and backward pass are written out, because
PyTorch's flash kernel for CPUs takes about twice as long in bfloat16 at the lengths of chat rows.

`register` makes it known to transformers under `NAME`. Without `row_lengths` (generation, plain forward passes) it is
transformers' `sdpa`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

NAME = "edgetune"
_BLOCK = 128  # queries a product; measured best of 64, 128, 256 on two AVX-512 cores at rows of 100-800 tokens
_ROUND = 16  # counts of queries and keys are multiples of this
_KEEP = 1024  # probabilities of longer rows are computed again in the backward pass: they grow with the square


def register() -> None:
    """Make the attention known to transformers as `NAME`; harmless when done twice."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def use(model: Any) -> bool:
    """Have `model` use this attention; False where it cannot take an attention from outside."""
    register()
    try:
        model.set_attn_implementation(NAME)
    except (ValueError, AttributeError):
        return False
    return True


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    row_lengths: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention interface.

    Args:
        module: the layer that asks.
        query: (1, H, T, D).
        key, value: (1, K, T, D), K a divisor of H.
        attention_mask: ignored where `row_lengths` are given.
        scaling: of the scores; 1/√D when None.
        dropout: of the probabilities; not there for packed rows.
        sliding_window: how many tokens a query sees, itself included; all before it when None.
        row_lengths: lengths of the rows in the T tokens.

    Returns:
        (1, T, H, D).
    """
    from transformers import AttentionInterface

    if row_lengths is None:
        plain = AttentionInterface()["sdpa"]
        return plain(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = sliding_window or 0
    with torch.autocast(query.device.type, enabled=False):
        query, key = query.to(value.dtype), key.to(value.dtype)  # rotary embeddings may have widened them
        if query.device.type == "cpu":
            return _Rows.apply(query[0], key[0], value[0], scale, tuple(row_lengths), window).unsqueeze(0), None
        return _by_row(query, key, value, scale, row_lengths, window), None


def _by_row(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, lengths: Sequence[int], window: int
) -> torch.Tensor:
    """PyTorch's kernels, a row at a time: for devices on which they are fast."""
    rows = zip(query.split(list(lengths), 2), key.split(list(lengths), 2), value.split(list(lengths), 2), strict=True)
    out = []
    for q, k, v in rows:
        mask = None
        if window and q.shape[2] > window:
            mask = ~_hidden(q.shape[2], q.shape[2], 0, window, str(q.device))
        out.append(
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
            )
        )
    return torch.cat(out, 2).transpose(1, 2)


@lru_cache(maxsize=512)
def _hidden(queries: int, keys: int, before: int, window: int, device: str = "cpu") -> torch.Tensor:
    """What `queries` positions, the first with `before` keys before it, must not see of `keys`: (queries, keys), bool."""
    at = torch.arange(before, before + queries, device=device)[:, None]
    seen = torch.arange(keys, device=device)[None]
    hidden = seen > at
    if window:
        hidden |= seen <= at - window
    return hidden


@dataclass(frozen=True)
class _Block:
    """Queries of one row and the keys that they may see, as places of the whole sequence.

    `queries` and `keys` are counts that were rounded up where the sequence goes on: what lies behind belongs to the next
    row, and is masked. So products have few different shapes, for each of which the library keeps code of its own.
    """

    first: int
    end: int
    start: int
    queries: int
    keys: int

    def probabilities(self, q: torch.Tensor, k: torch.Tensor, scale: float, window: int) -> torch.Tensor:
        """Softmax of the scores: q (K, G, T, D) and k (K, T, D) to (K, G · queries, keys); 0 where nothing is seen."""
        heads, group, _, size = q.shape
        wanted = (q[:, :, self.first : self.first + self.queries] * scale).reshape(heads, -1, size)
        scores = torch.bmm(wanted, self.of(k).transpose(1, 2)).view(heads, group, self.queries, self.keys)
        before = self.first - self.start
        if window and self.keys > window:
            scores.masked_fill_(_hidden(self.queries, self.keys, before, window), -math.inf)
        else:
            scores[..., before:].masked_fill_(_hidden(self.queries, self.keys - before, 0, 0), -math.inf)
        p = torch.softmax(scores, -1)
        if self.first + self.queries > self.end:
            p[:, :, self.end - self.first :] = 0
        return p.view(heads, -1, self.keys)

    def of(self, keys: torch.Tensor) -> torch.Tensor:
        """The block's part of keys or values (K, T, D)."""
        return keys[:, self.start : self.start + self.keys]

    @property
    def kept(self) -> bool:
        """Whether its probabilities are kept for the backward pass."""
        return self.end - self.start <= _KEEP


@lru_cache(maxsize=64)
def _blocks(lengths: tuple[int, ...], window: int) -> list[_Block]:
    total, row, found = sum(lengths), 0, []
    for length in lengths:
        for first in range(row, row + length, _BLOCK):
            end = min(first + _BLOCK, row + length)
            start = max(row, first - window + 1) if window else row
            queries, keys = (min(-(-(end - at) // _ROUND) * _ROUND, total - at) for at in (first, start))
            found.append(_Block(first, end, start, queries, keys))
        row += length
    return found


class _Rows(torch.autograd.Function):
    """q (H, T, D), k and v (K, T, D) to (T, H, D)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        lengths: tuple[int, ...],
        window: int,
    ) -> torch.Tensor:
        heads, tokens, size = q.shape
        grouped = q.view(k.shape[0], -1, tokens, size)
        out = q.new_empty(tokens, heads, v.shape[-1])
        kept = []
        for block in _blocks(lengths, window):
            p = block.probabilities(grouped, k, scale, window)
            mixed = torch.bmm(p, block.of(v)).view(heads, block.queries, -1)
            out[block.first : block.end] = mixed[:, : block.end - block.first].transpose(0, 1)
            if block.kept:
                kept.append(p)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.scale, ctx.lengths, ctx.window = scale, lengths, window
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        q, k, v, *kept = ctx.saved_tensors
        dout, scale, window = grads[0], ctx.scale, ctx.window
        heads, tokens, size = q.shape
        shared = k.shape[0]
        grouped = q.view(shared, -1, tokens, size)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        probabilities = iter(kept)
        for block in _blocks(ctx.lengths, window):
            first, end, asked = block.first, block.end, slice(block.first, block.first + block.queries)
            p = next(probabilities) if block.kept else block.probabilities(grouped, k, scale, window)
            d = dout[asked].transpose(0, 1).reshape(shared, -1, v.shape[-1])
            block.of(dv).baddbmm_(p.transpose(1, 2), d)
            dp = torch.bmm(d, block.of(v).transpose(1, 2))
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)  # p·(dp - Σ p·dp)
            found = torch.bmm(ds, block.of(k)).mul_(scale).view(heads, block.queries, size)
            dq[:, first:end] = found[:, : end - first]
            queries = grouped[:, :, asked].reshape(shared, -1, size)
            block.of(dk).baddbmm_(ds.transpose(1, 2), queries, alpha=scale)
        return dq, dk, dv, None, None, None
