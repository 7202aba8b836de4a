"""Least-error scales: never worse than the plain range, and as good as a fine search."""

from __future__ import annotations

import pytest
import torch

from edgetune.export.quantize.grid import Grid, Quantized, quantize
from edgetune.export.quantize.rtn import least_error, min_max

GRIDS = [Grid(4, 32), Grid(4, 32, True), Grid(8, 32), Grid(8, 64, True), Grid(4, 16), Grid(4, 128, True)]


def _error(weight: torch.Tensor, found: Quantized, importance: torch.Tensor | None = None) -> float:
    wrong = (weight - found.dequantize()).square()
    return float((wrong if importance is None else wrong * importance).sum())


@pytest.fixture
def weight() -> torch.Tensor:
    made = torch.Generator().manual_seed(0)
    return torch.randn(40, 200, generator=made) * torch.rand(40, 1, generator=made)  # no block size divides 200


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_least_error_is_better_than_the_plain_range(weight: torch.Tensor, grid: Grid) -> None:
    assert _error(weight, least_error(weight, grid)) < 0.97 * _error(weight, min_max(weight, grid))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_importance_moves_the_error_to_columns_that_weigh_less(weight: torch.Tensor, grid: Grid) -> None:
    importance = torch.rand(200, generator=torch.Generator().manual_seed(1)).pow(4)
    plain, weighed = least_error(weight, grid), least_error(weight, grid, importance)
    assert _error(weight, weighed, importance) < _error(weight, plain, importance)
    assert _error(weight, plain) < _error(weight, weighed)


def test_least_error_is_near_what_a_fine_search_finds(weight: torch.Tensor) -> None:
    grid = Grid(4, 32)
    widest = min_max(weight, grid).scales
    tried = [quantize(weight, share * widest, None, grid) for share in torch.linspace(-1.2, 1.2, 481)]
    errors = torch.stack([_by_block(weight, one) for one in tried])
    best = float(errors.nan_to_num(torch.inf).amin(0).sum())
    assert _error(weight, least_error(weight, grid)) < 1.03 * best


def _by_block(weight: torch.Tensor, found: Quantized) -> torch.Tensor:
    wrong = (weight - found.dequantize()).square()
    return torch.stack([part.sum(-1) for part in wrong.split(found.grid.block_size, -1)], -1)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_weights_on_the_grid_stay_what_they_are(grid: Grid) -> None:
    made = torch.Generator().manual_seed(3)
    codes = torch.randint(0, grid.top + 1, (8, 256), generator=made, dtype=torch.uint8)
    codes[:, ::16], codes[:, 1::16] = 0, grid.top  # each block uses its whole range
    zeros = torch.randint(1, grid.top, (8, grid.blocks(256)), generator=made, dtype=torch.uint8)
    exact = Quantized(grid, codes, torch.rand(8, grid.blocks(256)) + 0.1, zeros if grid.zero_points else None)
    weight = exact.dequantize()
    torch.testing.assert_close(least_error(weight, grid).dequantize(), weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_zeros_and_constants_have_no_error(grid: Grid) -> None:
    weight = torch.zeros(3, 64)
    weight[1], weight[2] = 0.7, -1e-3
    found = least_error(weight, grid)
    assert found.scales.isfinite().all()
    torch.testing.assert_close(found.dequantize(), weight, rtol=1e-5, atol=0)
