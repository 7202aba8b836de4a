"""Attention over packed rows against PyTorch's, row by row, in values and gradients."""

from __future__ import annotations

import pytest
import torch

from edgetune.train import attention


def plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], scale: float, window: int
) -> torch.Tensor:
    """Softmax(q·kᵀ) · v with a mask that is written down entry by entry."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    total = sum(lengths)
    row = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
    at = torch.arange(total)
    seen = (row[:, None] == row[None]) & (at[None] <= at[:, None])
    if window:
        seen &= at[None] > at[:, None] - window
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("lengths", [[7], [1, 130, 64], [300, 5, 129]])
@pytest.mark.parametrize("keep", [0, 1024])
def test_values_and_gradients(
    lengths: list[int], heads: tuple[int, int], window: int, keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_KEEP", keep)
    draw = torch.Generator().manual_seed(1)
    total, size = sum(lengths), 16
    tensors = [
        torch.randn(1, n, total, size, generator=draw, dtype=torch.float64).requires_grad_()
        for n in (heads[0], heads[1], heads[1])
    ]
    out, weights = attention.attend(
        None, *tensors, None, scaling=0.3, sliding_window=window or None, row_lengths=lengths
    )
    wanted = plain(*tensors, lengths, 0.3, window)
    assert weights is None and out.shape == (1, total, heads[0], size)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)
    upstream = torch.randn(out.shape, generator=draw, dtype=torch.float64)
    ours = torch.autograd.grad(out, tensors, upstream)
    theirs = torch.autograd.grad(wanted, tensors, upstream)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [0, 50])
def test_the_way_of_other_devices_gives_the_same(window: int) -> None:
    draw = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, n, 200, 16, generator=draw) for n in (6, 2, 2))
    there = attention._by_row(q, k, v, 0.25, [130, 70], window)
    torch.testing.assert_close(there, plain(q, k, v, [130, 70], 0.25, window), rtol=0, atol=1e-5)


def test_bfloat16_is_as_near_as_pytorchs_own() -> None:
    draw = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, n, 400, 64, generator=draw) for n in (9, 3, 3))
    exact = plain(q.double(), k.double(), v.double(), [400], 0.125, 0)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    ours = attention.attend(None, q, k, v, None, row_lengths=[400])[0].double()
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    error = (theirs.transpose(1, 2).double() - exact).norm()
    assert (ours - exact).norm() < 1.5 * error
