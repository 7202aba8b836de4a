"""GPTQ keeps outputs better than rounding does, never leaves the grid, and tells of Hessians that are none."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from edgetune.errors import EdgetuneError
from edgetune.export.quantize.gptq import correction, factor, gptq
from edgetune.export.quantize.grid import Grid
from edgetune.export.quantize.rtn import least_error, min_max

GRIDS = [Grid(4, 32), Grid(4, 32, True), Grid(8, 32), Grid(4, 16, True), Grid(4, 64)]


def _inputs(tokens: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Inputs as layers have them: correlated, a few columns much larger than the others."""
    made = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, columns // 2, generator=made) @ torch.randn(columns // 2, columns, generator=made)
    return mixed * torch.rand(columns, generator=made).pow(3) + 0.1 * torch.randn(tokens, columns, generator=made)


def _error(weight: torch.Tensor, other: torch.Tensor, hessian: torch.Tensor) -> float:
    change = weight - other
    return float((change @ hessian * change).sum())


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(48, 192, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_outputs_are_kept_better_than_by_rounding(weight: torch.Tensor, grid: Grid) -> None:
    inputs, unseen = _inputs(2500, 192).split((2000, 500))
    hessian = inputs.T @ inputs
    found = gptq(weight, factor(hessian, grid.block_size), grid).dequantize()
    rounded = least_error(weight, grid, hessian.diagonal()).dequantize()
    assert _error(weight, found, hessian) < 0.5 * _error(weight, rounded, hessian)
    fresh = unseen.T @ unseen
    assert _error(weight, found, fresh) < 0.5 * _error(weight, min_max(weight, grid).dequantize(), fresh)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_each_sweep_lowers_the_output_error(weight: torch.Tensor, grid: Grid) -> None:
    inputs = _inputs(1000, 192)
    factored = factor(inputs.T @ inputs, grid.block_size)
    hessian = torch.empty_like(factored.hessian)
    hessian[factored.order[:, None], factored.order] = factored.hessian  # the damped one is what is minimized
    errors = [
        _error(weight, gptq(weight, factored, grid, sweeps=sweeps).dequantize(), hessian) for sweeps in (0, 1, 2, 4)
    ]
    assert all(after <= before * (1 + 1e-4) for before, after in pairwise(errors))
    assert errors[-1] < 0.97 * errors[0]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_unrelated_inputs_leave_nothing_to_make_up_for(weight: torch.Tensor, grid: Grid) -> None:
    found = gptq(weight, factor(torch.eye(192), grid.block_size), grid, sweeps=0)
    torch.testing.assert_close(found.dequantize(), least_error(weight, grid).dequantize(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_result_lies_on_the_grid(weight: torch.Tensor, grid: Grid) -> None:
    inputs = _inputs(300, 192)
    found = gptq(weight, factor(inputs.T @ inputs, grid.block_size), grid)
    assert found.codes.dtype == torch.uint8
    assert int(found.codes.max()) <= grid.top
    assert found.scales.shape == (48, grid.blocks(192))
    assert (found.zeros is not None) == grid.zero_points


def test_fewer_rows_than_columns_and_inputs_that_are_always_zero(weight: torch.Tensor) -> None:
    inputs = _inputs(20, 192)
    inputs[:, 40:80] = 0
    found = gptq(weight, factor(inputs.T @ inputs, 32), Grid(4, 32)).dequantize()
    assert found.isfinite().all()
    assert (found - weight)[:, 40:64].abs().max() < 0.5  # rounded like any other weight


def test_activations_that_are_not_numbers_are_told_of() -> None:
    with pytest.raises(EdgetuneError, match="not finite"):
        factor(torch.full((32, 32), torch.nan), 32)


def test_a_correction_makes_up_for_errors_in_the_inputs(weight: torch.Tensor) -> None:
    exact, made = _inputs(3000, 192), torch.Generator().manual_seed(3)
    rounded = (
        exact + 0.2 * exact @ torch.randn(192, 192, generator=made) / 192**0.5
    )  # as a matrix before it has bent them
    (seen, fresh), (seen_exact, fresh_exact) = rounded.split((2500, 500)), exact.split((2500, 500))
    bent = weight + weight @ correction(seen.T @ seen, (seen_exact - seen).T @ seen)
    before, after = ((fresh @ one.T - fresh_exact @ weight.T).square().mean() for one in (weight, bent))
    assert after < 0.5 * before


def test_exact_inputs_want_no_correction_and_silent_ones_bring_none() -> None:
    inputs = _inputs(500, 64)
    inputs[:, :3] = 0
    assert not correction(inputs.T @ inputs, torch.zeros(64, 64)).any()
    assert correction(torch.zeros(64, 64), torch.zeros(64, 64)).isfinite().all()
