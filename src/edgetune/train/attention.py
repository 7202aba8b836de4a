"""Attention over rows that lie one behind the other in one sequence, each seeing only itself.

No mask over the whole and no padded sequence exist: each row's queries are cut into blocks that only meet the
keys they may see, and blocks of one shape go through their products together. Both passes are written out, because
PyTorch's flash kernel for CPUs takes about twice as long in bfloat16 at the lengths of chat rows.

`register` makes it known to transformers under `NAME`. Without `row_lengths` (generation, plain forward passes) it is
transformers' `sdpa`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.attention

if TYPE_CHECKING:
    import numpy as np

NAME = "edgetune"
_BLOCK = 128  # queries a product; measured best of 64, 128, 256 on two AVX-512 cores at rows of 100-800 tokens
_ROUND = 16  # counts of queries and keys are multiples of this
_SCORES = 4_000_000  # at a time
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
    """PyTorch's kernels, a row at a time: for devices on which they are fast.

    cuDNN's is left out: it compiles a plan for each length that it meets, and rows have many.
    """
    kernels: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if query.device.type == "cuda":
        backends = torch.nn.attention.SDPBackend
        kernels = torch.nn.attention.sdpa_kernel(
            [backends.FLASH_ATTENTION, backends.EFFICIENT_ATTENTION, backends.MATH]
        )
    rows = zip(query.split(list(lengths), 2), key.split(list(lengths), 2), value.split(list(lengths), 2), strict=True)
    out = []
    with kernels:
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


@lru_cache(maxsize=64)
def _hidden(queries: int, keys: int, before: int, window: int, device: str = "cpu") -> torch.Tensor:
    """What `queries` positions, the first with `before` keys before it, must not see of `keys`: (queries, keys), bool."""
    at = torch.arange(before, before + queries, device=device)[:, None]
    seen = torch.arange(keys, device=device)[None]
    hidden = seen > at
    if window:
        hidden |= seen <= at - window
    return hidden


@lru_cache(maxsize=64)
def _mask(queries: int, keys: int, window: int, heads: int, dtype: torch.dtype) -> torch.Tensor:
    """What is added to the scores of `heads` query heads, one below the other: (heads · queries, keys); 0 or -inf."""
    hidden = _hidden(queries, keys, keys - queries, window)
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -math.inf).repeat(heads, 1)


@dataclass(frozen=True)
class _Places:
    """Which rows of one matrix make up each row of another: none (zeros), one, or several, which are added up."""

    index: torch.Tensor
    ends: torch.Tensor

    @classmethod
    def there(cls, source: np.ndarray) -> _Places:
        """Row i is row `source[i]`; zeros where that is negative."""
        import numpy as np

        ends = np.concatenate([[0], np.cumsum(source >= 0)])
        return cls(torch.from_numpy(source[source >= 0]), torch.from_numpy(ends))

    @classmethod
    def back(cls, source: np.ndarray, rows: int) -> _Places:
        """Row r of `rows` is the sum of all rows i of which `source[i]` is r."""
        import numpy as np

        order = np.argsort(source, kind="stable")[np.count_nonzero(source < 0) :]
        return cls(torch.from_numpy(order), torch.from_numpy(np.searchsorted(source[order], np.arange(rows + 1))))

    def take(self, matrix: torch.Tensor) -> torch.Tensor:
        """(…, D) to (rows, D). Sums of bfloat16 are made in float32."""
        flat = matrix.reshape(-1, matrix.shape[-1])
        return torch.nn.functional.embedding_bag(self.index, flat, self.ends, mode="sum", include_last_offset=True)


@dataclass(frozen=True)
class _Group:
    """Blocks of one shape, which go through their products together."""

    count: int
    queries: int
    keys: int


@dataclass(frozen=True)
class _Layout:
    """How T tokens, H query heads and K key heads are cut into blocks: queries of a row, and the keys that they may see.

    Blocks lie one behind the other, those of a group together, each filled up with zeros to multiples of `_ROUND`: so
    there are few shapes, for each of which the library keeps code of its own.
    """

    heads: int
    shared: int
    groups: tuple[_Group, ...]
    asking: _Places
    asked: _Places
    seeing: _Places
    seen: _Places

    def ask(self, source: torch.Tensor) -> list[torch.Tensor]:
        """(H, T, D) to each group's queries: (n · K, G · queries, D)."""
        parts = self.asking.take(source.transpose(0, 1)).split([g.count * self.heads * g.queries for g in self.groups])
        return [
            part.view(g.count * self.shared, -1, part.shape[-1]) for g, part in zip(self.groups, parts, strict=True)
        ]

    def see(self, source: torch.Tensor) -> list[torch.Tensor]:
        """(K, T, D) to each group's keys or values: (n · K, keys, D)."""
        parts = self.seeing.take(source.transpose(0, 1)).split([g.count * self.shared * g.keys for g in self.groups])
        return [part.view(-1, g.keys, part.shape[-1]) for g, part in zip(self.groups, parts, strict=True)]

    def answers(self, found: list[torch.Tensor]) -> torch.Tensor:
        """What the groups found for their queries: to (T, H, D)."""
        return self.asked.take(torch.cat([part.flatten(0, -2) for part in found])).unflatten(0, (-1, self.heads))

    def shares(self, found: list[torch.Tensor]) -> torch.Tensor:
        """What the groups found for their keys or values, added up: to (T, K, D)."""
        return self.seen.take(torch.cat([part.flatten(0, -2) for part in found])).unflatten(0, (-1, self.shared))


@lru_cache(maxsize=16)
def _layout(lengths: tuple[int, ...], window: int, heads: int, shared: int) -> _Layout:
    import numpy as np

    found: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    row = 0
    for length in lengths:
        for first in range(row, row + length, _BLOCK):
            end = min(first + _BLOCK, row + length)
            start = max(row, first - window + 1) if window else row
            queries = -(-(end - first) // _ROUND) * _ROUND
            found.setdefault((queries, first - start + queries), []).append((first, end, start))
        row += length
    groups: list[_Group] = []
    asks: list[np.ndarray] = []
    sees: list[np.ndarray] = []
    for (queries, keys), blocks in found.items():
        left = len(blocks)
        while left:
            most = min(left, max(1, _SCORES // (heads * queries * keys)))
            groups.append(_Group(1 << (most.bit_length() - 1), queries, keys))
            left -= groups[-1].count
        firsts, ends, starts = (np.array(place)[:, None] for place in zip(*blocks, strict=True))
        for places, begins, count, among in ((asks, firsts, queries, heads), (sees, starts, keys, shared)):
            token = begins + np.arange(count)
            token[token >= ends] = -among  # negative for each head
            places.append((token[:, None] * among + np.arange(among)[:, None]).ravel())
    ask, see = np.concatenate(asks), np.concatenate(sees)
    return _Layout(
        heads, shared, tuple(groups), _Places.there(ask), _Places.back(ask, row * heads), _Places.there(see),
        _Places.back(see, row * shared),
    )  # fmt: skip


def _probabilities(q: torch.Tensor, k: torch.Tensor, group: _Group, scale: float, window: int) -> torch.Tensor:
    """Softmax of the scores: q (n · K, G · queries, D) and k (n · K, keys, D) to (n · K, G · queries, keys)."""
    mask = _mask(group.queries, group.keys, window, q.shape[1] // group.queries, q.dtype)
    return torch.softmax(torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale), -1)


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
        layout = _layout(lengths, window, len(q), len(k))
        kept, found = [], []
        for group, asking, keys, values in zip(layout.groups, layout.ask(q), layout.see(k), layout.see(v), strict=True):
            p = _probabilities(asking, keys, group, scale, window)
            found.append(torch.bmm(p, values))
            if group.keys <= _KEEP:
                kept.append(p)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.scale, ctx.layout, ctx.window = scale, layout, window
        return layout.answers(found)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        q, k, v, *kept = ctx.saved_tensors
        scale, layout, window = ctx.scale, ctx.layout, ctx.window
        probabilities = iter(kept)
        for_q, for_k, for_v = [], [], []
        laid = layout.ask(q), layout.see(k), layout.see(v), layout.ask(grads[0].transpose(0, 1))
        for group, asking, keys, values, d in zip(layout.groups, *laid, strict=True):
            if group.keys <= _KEEP:
                p = next(probabilities)
            else:
                p = _probabilities(asking, keys, group, scale, window)
            for_v.append(torch.bmm(p.transpose(1, 2), d))
            dp = torch.bmm(d, values.transpose(1, 2))
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype).mul_(scale)  # p·(dp - Σ p·dp), by the scale
            for_q.append(torch.bmm(ds, keys))
            for_k.append(torch.bmm(ds.transpose(1, 2), asking))
        dq, dk, dv = layout.answers(for_q), layout.shares(for_k), layout.shares(for_v)
        return dq.transpose(0, 1), dk.transpose(0, 1), dv.transpose(0, 1), None, None, None
