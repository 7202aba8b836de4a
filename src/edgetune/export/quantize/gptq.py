"""GPTQ: codes that keep a layer's outputs, where rounding each weight by itself would keep the weights.

The error of a linear layer on its inputs X is tr(D H D^T), with D the change of its weights and H = X^T X. Columns are
rounded one after the other, and what each does to the outputs is made up for by those that follow. See Frantar et al.,
"GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv 2210.17323. Afterwards each
code and each scale is fitted once more while all others are held, as in Behdin et al., "QuantEase", arXiv 2309.01885.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgetune.errors import EdgetuneError
from edgetune.export.quantize.grid import Grid, Quantized
from edgetune.export.quantize.rtn import search

if TYPE_CHECKING:
    import torch

_DAMP = 0.01  # of the Hessian's mean diagonal, as in the paper
_HOLD = 0.3  # of the same: calibration rows are few, and with less damping the correction learns them by heart
_TRIES = 6  # each with ten times the damping of the one before
_BATCH = 256  # columns whose effect on all later ones is brought in at once: one large product, not many small ones


@dataclass
class Factor:
    """What GPTQ needs of a Hessian; one is enough for all matrices that read the same inputs in blocks of one size.

    Attributes:
        order: (columns,) int64, columns in the order in which they are rounded. Blocks stay whole: those that matter
            most go first, and so do columns within a block.
        upper: (columns, columns) float32, in that order: U with U^T U = H^-1.
        hessian: (columns, columns) float32, damped, in that order.
    """

    order: torch.Tensor
    upper: torch.Tensor
    hessian: torch.Tensor


def factor(hessian: torch.Tensor, block_size: int) -> Factor:
    """Order and factorize the Hessian of a layer's inputs.

    Args:
        hessian: (columns, columns) float32, X^T X, in any scale; it is not changed.
        block_size: of the grid; it must divide the columns.

    Raises:
        EdgetuneError: it holds numbers that are not finite.
    """
    import torch

    if not hessian.isfinite().all():
        raise EdgetuneError("the model's activations are not finite numbers", fix="check the model that is exported")
    size = hessian.shape[0]
    diagonal = hessian.diagonal().clone()
    mean = float(diagonal.mean()) or 1.0
    by_block = diagonal.reshape(-1, block_size)
    blocks = by_block.sum(-1).argsort(descending=True, stable=True)
    within = by_block.argsort(dim=-1, descending=True, stable=True)
    order = (blocks[:, None] * block_size + within[blocks]).flatten()
    ordered = hessian[order][:, order]
    never = ordered.diagonal() == 0  # an input that is always zero: any weight will do, so its own is kept
    damp = _DAMP * mean
    for _ in range(_TRIES):
        ordered.diagonal().add_(damp)
        ordered.diagonal()[never] += mean
        # H = R R^T with R upper, by Cholesky from the last column to the first; then U is the inverse of R.
        lower, failed = torch.linalg.cholesky_ex(ordered.flip(0, 1))
        if not int(failed):
            root = lower.flip(0, 1)
            return Factor(order, torch.linalg.solve_triangular(root, torch.eye(size), upper=True), ordered)
        damp *= 10
    raise EdgetuneError("the Hessian of a layer cannot be factorized", fix="calibrate on more rows")


def correction(hessian: torch.Tensor, apart: torch.Tensor) -> torch.Tensor:
    """C (columns, columns) of the weights W + W·C that give on the inputs X of a quantized model, as nearly as they can, what
    W gives on those of the exact one, E: the least squares of X·(W + W·C)^T and E·W^T.

    Errors that earlier matrices left in the inputs are made up for so before a matrix is rounded, also one of 8 bits. See
    Li et al., "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration", arXiv 2504.02692, and Zhang et
    al., "Qronos", arXiv 2505.11695.

    Args:
        hessian: (columns, columns) float32, X^T X.
        apart: (columns, columns) float32, (E - X)^T X.
    """
    import torch

    damped = hessian.clone()
    damped.diagonal().add_(_HOLD * (float(hessian.diagonal().mean()) or 1.0))
    found: torch.Tensor = torch.linalg.solve(damped, apart.T, left=True).T
    return found


def gptq(weight: torch.Tensor, factored: Factor, grid: Grid, *, sweeps: int = 2) -> Quantized:
    """Codes and scales that keep the layer's outputs on its calibration inputs.

    Args:
        weight: (rows, columns) float32; not changed.
        factored: of the inputs' Hessian, for the grid's block size.
        grid: its block size divides the columns.
        sweeps: how often codes and scales are fitted again afterwards.

    Returns:
        The matrix on the grid.
    """
    import torch

    rows, columns = weight.shape
    size, order = grid.block(columns), factored.order
    left = weight.T[order].contiguous()  # (columns, rows): a column of the weight is one run of memory
    values, zeros = torch.empty_like(left), torch.empty(columns // size, rows)
    scales = torch.empty_like(zeros)
    batch = max(_BATCH, size)
    for start in range(0, columns, batch):
        end = min(start + batch, columns)
        wrong = torch.empty(end - start, rows)
        for at in range(start, end, size):
            here = slice(at, at + size)
            upper = factored.upper[here, here]
            found = _block_grid(left[here], upper, grid)
            values[here], wrong[at - start : at - start + size] = _round_block(left[here], upper, *found, grid)
            scales[at // size], zeros[at // size] = found
            rest = slice(at + size, end)
            left[rest].addmm_(factored.upper[here, rest].T, wrong[at - start : at - start + size], alpha=-1)
        left[end:].addmm_(factored.upper[start:end, end:].T, wrong, alpha=-1)
    original = weight.T[order].contiguous()
    for _ in range(sweeps):
        _sweep(original, factored.hessian, values, scales, zeros, grid)
    return _collect(values, scales, zeros, order, grid)


def _block_grid(block: torch.Tensor, upper: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points (rows,), as float, of a block (size, rows).

    An error in column j costs its square over U_jj squared once the later columns have made up for it.
    """
    import torch

    scales, zeros = search(block.T.contiguous(), grid, upper.diagonal().square().reciprocal())
    return scales[:, 0], torch.full_like(scales[:, 0], grid.middle) if zeros is None else zeros[:, 0].float()


def _round_block(
    block: torch.Tensor, upper: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes less zero (size, rows) of a block, and the errors that later columns make up for; `block` is used up."""
    import torch

    values, wrong = torch.empty_like(block), torch.empty_like(block)
    inverse, low, high = _reciprocal(scale), -zero, grid.top - zero
    for i in range(block.shape[0]):
        values[i] = torch.clamp((block[i] * inverse).round_(), low, high)
        wrong[i] = torch.addcmul(block[i], values[i], scale, value=-1).div_(upper[i, i])
        block[i + 1 :].addr_(upper[i, i + 1 :], wrong[i], alpha=-1)
    return values, wrong


def _sweep(
    wanted: torch.Tensor,
    hessian: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    grid: Grid,
) -> None:
    """Fit each block's codes, one column at a time, then its scales, while all else is held; changes them in place.

    The output error falls or stays with each step: a code is the grid's best for its column, a scale the best for its
    block.
    """
    size = grid.block_size
    left = wanted - (values.unflatten(0, (-1, size)) * scales[:, None]).flatten(0, 1)
    for block in range(scales.shape[0]):
        here = slice(block * size, (block + 1) * size)
        own = hessian[here, here]
        pull = hessian[here] @ left  # (size, rows): how much the error falls for a small step of each weight
        scale, low, high = scales[block], -zeros[block], grid.top - zeros[block]
        inverse, codes, changed = _reciprocal(scale), values[here], left[here]
        for i in range(size):
            best = (pull[i] / own[i, i]).mul_(inverse).add_(codes[i]).round_().clamp_(low, high)
            step = (best - codes[i]).mul_(scale)
            codes[i] = best
            pull.addr_(own[:, i], step, alpha=-1)
            changed[i] -= step
        against = (codes * (own @ codes)).sum(0)
        step = (codes * pull).sum(0) / against.clamp(min=1e-30)
        scales[block] += step
        changed -= codes * step


def _reciprocal(scale: torch.Tensor) -> torch.Tensor:
    return scale.reciprocal().nan_to_num_(nan=0, posinf=0, neginf=0)


def _collect(
    values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, order: torch.Tensor, grid: Grid
) -> Quantized:
    """Back from the order of rounding to that of the matrix."""
    import torch

    size = grid.block_size
    codes = (values.unflatten(0, (-1, size)) + zeros[:, None]).flatten(0, 1).to(torch.uint8)
    place = order.argsort()
    blocks = (order[::size] // size).argsort()
    found = zeros[blocks].T.contiguous().to(torch.uint8) if grid.zero_points else None
    return Quantized(grid, codes[place].T.contiguous(), scales[blocks].T.contiguous(), found)
