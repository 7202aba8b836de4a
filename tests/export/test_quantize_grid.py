"""The grids against ONNX Runtime's own operators and its own quantizer, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetune.errors import InputError
from edgetune.export.quantize.grid import BLOCK_SIZES, Grid, Quantized, pack, unpack, unpacked
from edgetune.export.quantize.rtn import min_max

GRIDS = st.builds(Grid, st.sampled_from([4, 8]), st.sampled_from(BLOCK_SIZES), st.booleans())


def _matrix(rows: int, columns: int, seed: int) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=made) * torch.rand(rows, 1, generator=made)


def _random(rows: int, columns: int, grid: Grid, seed: int) -> Quantized:
    """Any codes, scales and zero points that the grid can hold."""
    made = torch.Generator().manual_seed(seed)
    blocks = grid.blocks(columns)
    codes = torch.randint(0, grid.top + 1, (rows, columns), generator=made, dtype=torch.uint8)
    zeros = torch.randint(0, grid.top + 1, (rows, blocks), generator=made, dtype=torch.uint8)
    return Quantized(grid, codes, torch.randn(rows, blocks, generator=made), zeros if grid.zero_points else None)


def _run(op: str, inputs: dict[str, np.ndarray], fed: str, shape: list[Any], **attributes: int) -> np.ndarray:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    kind = helper.np_dtype_to_tensor_dtype(inputs[fed].dtype)
    graph = helper.make_graph(
        [helper.make_node(op, list(inputs), ["out"], domain="com.microsoft", **attributes)],
        "one",
        [helper.make_tensor_value_info(fed, kind, inputs[fed].shape)],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(value, name) for name, value in inputs.items() if name != fed],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)], ir_version=10
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["out"], {fed: inputs[fed]})[0])


@settings(max_examples=40, deadline=None)
@given(GRIDS, st.integers(1, 20), st.integers(1, 300), st.integers(0, 10**6))
def test_matmul_nbits_computes_with_our_weights(grid: Grid, rows: int, columns: int, seed: int) -> None:
    made = _random(rows, columns, grid, seed)
    zeros = made.packed_zeros()
    inputs = {
        "x": np.eye(columns, dtype=np.float32),
        "b": made.packed_codes().numpy(),
        "s": made.scales.numpy(),
        **({} if zeros is None else {"z": zeros.numpy()}),
    }
    theirs = _run(
        "MatMulNBits", inputs, "x", [columns, rows], K=columns, N=rows, bits=grid.bits, block_size=grid.block_size
    )
    ours = made.dequantize().numpy().T
    # an identity on the left picks single weights: no sum, so nothing to round differently
    np.testing.assert_array_equal(theirs, ours)


@settings(max_examples=40, deadline=None)
@given(GRIDS, st.integers(1, 20), st.integers(1, 150), st.integers(0, 10**6))
def test_gather_block_quantized_reads_our_weights(grid: Grid, rows: int, half: int, seed: int) -> None:
    columns = 2 * half  # two 4-bit codes fill a byte
    made = _random(rows, columns, grid, seed)
    zeros = made.packed_zeros()
    inputs = {
        "d": made.gather_codes().numpy(),
        "i": np.arange(rows, dtype=np.int64),
        "s": made.scales.numpy(),
        **({} if zeros is None else {"z": zeros.numpy()}),
    }
    theirs = _run(
        "GatherBlockQuantized",
        inputs,
        "i",
        [rows, columns],
        bits=grid.bits,
        block_size=grid.block_size,
        gather_axis=0,
        quantize_axis=1,
    )
    np.testing.assert_array_equal(theirs, made.dequantize().numpy())


@settings(max_examples=60, deadline=None)
@given(GRIDS, st.integers(1, 12), st.integers(1, 300), st.integers(0, 10**6))
def test_min_max_is_the_quantizer_of_onnx_runtime(grid: Grid, rows: int, columns: int, seed: int) -> None:
    from onnxruntime.capi._pybind_state import quantize_matmul_4bits, quantize_matmul_8bits

    weight = _matrix(rows, columns, seed)
    blocks, size = grid.blocks(columns), grid.block_size * grid.bits // 8
    codes = np.zeros((rows, blocks, size), np.uint8)
    zeros = np.zeros((rows, -(-blocks * grid.bits // 8)), np.uint8)
    scales = np.zeros((rows, blocks), np.float32)
    filled = np.zeros((blocks * grid.block_size, rows), np.float32)
    filled[:columns] = weight.numpy().T
    theirs = quantize_matmul_4bits if grid.bits == 4 else quantize_matmul_8bits
    theirs(codes, filled, scales, zeros, grid.block_size, rows, columns, not grid.zero_points)

    ours = min_max(weight, grid)
    other = unpacked(
        torch.from_numpy(codes),
        torch.from_numpy(scales),
        torch.from_numpy(zeros) if grid.zero_points else None,
        grid,
        columns,
    )
    assert torch.equal(ours.scales, other.scales)
    assert torch.equal(ours.codes, other.codes)
    if ours.zeros is not None:
        assert other.zeros is not None
        assert torch.equal(ours.zeros, other.zeros)


@settings(max_examples=60, deadline=None)
@given(GRIDS, st.integers(1, 20), st.integers(1, 400), st.integers(0, 10**6))
def test_what_is_packed_is_unpacked(grid: Grid, rows: int, columns: int, seed: int) -> None:
    made = _random(rows, columns, grid, seed)
    again = unpacked(made.packed_codes(), made.scales, made.packed_zeros(), grid, columns)
    assert torch.equal(again.codes, made.codes)
    assert torch.equal(again.dequantize(), made.dequantize())


def test_the_first_code_lies_in_the_low_half() -> None:
    assert pack(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist() == [0x21, 0x03]
    assert unpack(torch.tensor([0x21, 0x03], dtype=torch.uint8), 4, 3).tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "grid", [Grid(4, 32), Grid(4, 32, True), Grid(8, 64), Grid(4, 64, True), Grid(8, 16, True)], ids=str
)
def test_size_counts_what_a_node_stores(grid: Grid) -> None:
    made = min_max(_matrix(6, 200, 0), grid)
    zeros, wide = made.packed_zeros(), 2 if grid.bits == 4 else 4  # bytes of a scale
    stored = made.packed_codes().numel() + wide * made.scales.numel() + (0 if zeros is None else zeros.numel())
    assert grid.size(6, 200) == stored


@pytest.mark.parametrize(("bits", "block"), [(3, 32), (4, 24), (4, 8), (8, 512)])
def test_a_grid_that_the_operators_lack_is_refused(bits: int, block: int) -> None:
    with pytest.raises(InputError):
        Grid(bits, block)
