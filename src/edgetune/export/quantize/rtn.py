"""Round to nearest: the scales and zero points of each block of a matrix, and the nearest codes under them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgetune.export.quantize.grid import Grid, Quantized, in_blocks, quantize

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

_SHARES = {4: (1.0, 0.95, 0.9, 0.84, 0.78, 0.7, 0.6), 8: (1.0, 0.98, 0.95, 0.9)}  # of a block's range, by bits
_REFITS = 3  # least-squares fits of the scale to the codes, each followed by new codes
_CHUNK = 1 << 20  # weights that are searched at once: the working copies stay in the cache


def min_max(weight: torch.Tensor, grid: Grid) -> Quantized:
    """The range of each block from its least to its largest weight: what ONNX Runtime's own quantizer does.

    Args:
        weight: (rows, columns) float32.

    Returns:
        The matrix on the grid; equal in every bit to `quantize_matmul_4bits` and `quantize_matmul_8bits`.
    """
    blocks = in_blocks(weight, grid)
    scales, zeros = _range(blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0), grid)
    return quantize(weight, scales, zeros, grid)


def least_error(weight: torch.Tensor, grid: Grid, importance: torch.Tensor | None = None) -> Quantized:
    """The scales and zero points under which each block's rounding error is least, and the codes.

    Narrower ranges are tried on both sides, since a few clipped weights often cost less than coarse steps for all;
    then scale and codes are fitted to each other in turn, each by least squares, which never makes the error larger.

    Args:
        weight: (rows, columns) float32.
        importance: (columns,) float32, what a squared error in each column weighs: the mean square of the layer's
            inputs, which is the diagonal of the Hessian of its output error. All columns weigh the same if None.
    """
    import torch

    scales, zeros = search(weight, grid, importance)
    found = quantize(weight, scales, zeros, grid, even=True)
    assert found.codes.dtype == torch.uint8
    return found


def search(
    weight: torch.Tensor, grid: Grid, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The scales (rows, blocks) float32 and zero points (rows, blocks) uint8 of `least_error`, without the codes."""
    import torch

    rows = max(1, _CHUNK // weight.shape[1])
    weighing = None if importance is None else in_blocks(importance[None], grid)
    parts = [_search(in_blocks(part, grid), grid, weighing) for part in weight.split(rows)]
    zeros = torch.cat([zero for _, zero in parts]).to(torch.uint8) if grid.zero_points else None
    return torch.cat([scale for scale, _ in parts]), zeros


def _search(blocks: torch.Tensor, grid: Grid, importance: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The best of the candidates for blocks (rows, blocks, size), and its refits; zero points as float."""
    import torch

    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    best = torch.full_like(low, torch.inf)
    best_scale, best_zero = torch.zeros_like(low), torch.full_like(low, grid.middle)

    def keep(scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        nonlocal best, best_scale, best_zero
        codes = _codes(blocks, scale, zero, grid)
        wrong = torch.addcmul(blocks, codes, scale[..., None], value=-1).square_()
        error = (wrong if importance is None else wrong.mul_(importance)).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        return codes

    for scale, zero in _candidates(low, high, grid):
        keep(scale, zero)
    for _ in range(_REFITS):
        codes = _codes(blocks, best_scale, best_zero, grid)
        weighed = codes if importance is None else codes * importance
        squares = (weighed * codes).sum(-1)
        fitted = (weighed * blocks).sum(-1) / squares.clamp(min=1e-30)
        keep(torch.where(squares > 0, fitted, best_scale), best_zero)
    return best_scale, best_zero


def _codes(blocks: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Codes less their zero, as float: what the scale is multiplied with."""
    inverse = (1 / scale).nan_to_num_(posinf=0, neginf=0)
    codes = (blocks * inverse[..., None]).round_()
    return codes.clamp_(-zero[..., None], (grid.top - zero)[..., None])


def _candidates(low: torch.Tensor, high: torch.Tensor, grid: Grid) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Scales and zero points, as float, of ranges around zero that are as wide as the block's or narrower."""
    import torch

    middle = torch.full_like(low, grid.middle)
    if not grid.zero_points:
        for share in _SHARES[grid.bits]:
            # codes reach from -8 to 7: either end may hold the larger side, and the scale's sign says which
            yield share * torch.maximum(-low / grid.middle, high / (grid.middle - 1)), middle
            yield -share * torch.maximum(high / grid.middle, -low / (grid.middle - 1)), middle
        return
    for below in _SHARES[grid.bits]:
        for above in _SHARES[grid.bits]:
            scales, zeros = _range(below * low, above * high, grid)
            assert zeros is not None
            yield scales, zeros.float()


def _range(low: torch.Tensor, high: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales and zero points, each (rows, blocks), of ranges low <= 0 <= high."""
    import torch

    if not grid.zero_points:  # the weight that is farthest from zero becomes code 0, so the scale has its sign turned
        return torch.where(high > -low, high, low) / -grid.middle, None
    scales = (high - low) / grid.top
    zeros = torch.where(scales == 0, scales, -low / scales)
    return scales, (zeros + 0.5).floor().clamp(0, grid.top).to(torch.uint8)
