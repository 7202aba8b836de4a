"""The integer grids of ONNX Runtime's `MatMulNBits`, `GatherBlockQuantized` and `DynamicQuantizeMatMul`, bit for bit.

A matrix W (rows, columns), as torch.nn.Linear keeps it, is cut along its columns into blocks. A block has one scale
(float32) and, with zero points, one zero point (unsigned). A weight is (code - zero) * scale; without zero points the
zero is the middle of the codes, 8 of 0..15 or 128 of 0..255. Scales may be negative.

`DynamicQuantizeMatMul` has one scale for a whole row, no zero points, and 8 bits; at run time it rounds the layer's
inputs to 8 bits too, with one scale and zero point for the whole tensor.

The operators are described in ONNX Runtime's docs/ContribOperators.md (domain com.microsoft).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from edgetune.errors import InputError

if TYPE_CHECKING:
    import torch

BLOCK_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Grid:
    """One way to store a matrix, and to compute with it.

    Attributes:
        bits: 4 or 8.
        block_size: columns that share a scale: 16, 32, 64, 128 or 256. It says nothing where activations are int8.
        zero_points: a zero point for each block; else codes are symmetric around the middle.
        activations: `float`: the kernel is `MatMulNBits`. `int8`: it is `DynamicQuantizeMatMul`, with 8 bits, a scale a
            row and no zero points.

    Raises:
        InputError: the operators do not have such a grid.
    """

    bits: int
    block_size: int = 32
    zero_points: bool = False
    activations: Literal["float", "int8"] = "float"

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise InputError(f"{self.bits} bits are not a grid of MatMulNBits here", fix="choose 4 or 8 bits")
        if self.block_size not in BLOCK_SIZES:
            raise InputError(f"a block of {self.block_size} is not possible", fix=f"choose one of {BLOCK_SIZES}")
        if self.activations == "int8" and (self.bits != 8 or self.zero_points):
            raise InputError(
                "int8 activations go with 8-bit weights without zero points", fix="set bits: 8, zero_points: false"
            )

    @property
    def top(self) -> int:
        """The largest code: 15 or 255."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero of a block without zero point: 8 or 128."""
        return 1 << (self.bits - 1)

    def block(self, columns: int) -> int:
        """Columns that share a scale, in a matrix of so many columns."""
        return columns if self.activations == "int8" else self.block_size

    def blocks(self, columns: int) -> int:
        """How many blocks a row of so many columns has; the last one may be short."""
        return -(-columns // self.block(columns))

    def size(self, rows: int, columns: int) -> int:
        """Bytes of codes, scales and zero points of such a matrix in the graph; scales of 4-bit weights have 16 bits."""
        blocks = self.blocks(columns)
        codes = blocks * self.block(columns) * self.bits // 8
        return rows * (
            codes + (2 if self.bits == 4 else 4) * blocks + (-(-blocks * self.bits // 8) if self.zero_points else 0)
        )

    def __str__(self) -> str:
        if self.activations == "int8":
            return "int8, activations int8"
        return f"int{self.bits} block {self.block_size}{' with zero points' if self.zero_points else ''}"


@dataclass
class Quantized:
    """A matrix on its grid, unpacked.

    Attributes:
        codes: (rows, columns) uint8.
        scales: (rows, blocks) float32.
        zeros: (rows, blocks) uint8, or None on a grid without zero points.
    """

    grid: Grid
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None

    def dequantize(self) -> torch.Tensor:
        """The weights (rows, columns) float32 that ONNX Runtime computes with."""
        rows, columns = self.codes.shape
        codes = in_blocks(self.codes, self.grid).float()
        zeros = self.grid.middle if self.zeros is None else self.zeros[..., None].float()
        return ((codes - zeros) * self.scales[..., None]).reshape(rows, -1)[:, :columns]

    def as_stored(self) -> Quantized:
        """With the scales that the graph keeps: 16 bits for 4-bit weights, of which they would be a fifth otherwise."""
        scales = self.scales.half().float() if self.grid.bits == 4 else self.scales
        return Quantized(self.grid, self.codes, scales, self.zeros)

    def packed_codes(self) -> torch.Tensor:
        """Input B of `MatMulNBits`: (rows, blocks, bytes of a block) uint8; a short last block is filled up."""
        codes = in_blocks(self.codes, self.grid)
        return pack(codes, self.grid.bits)

    def packed_zeros(self) -> torch.Tensor | None:
        """Input zero_points of both operators: (rows, bytes) uint8, a row filled up to whole bytes."""
        return None if self.zeros is None else pack(self.zeros, self.grid.bits)

    def gather_codes(self) -> torch.Tensor:
        """Input data of `GatherBlockQuantized` with quantize_axis 1: (rows, columns * bits / 8) uint8."""
        return pack(self.codes, self.grid.bits)


def in_blocks(matrix: torch.Tensor, grid: Grid) -> torch.Tensor:
    """(rows, columns) as (rows, blocks, block size); a short last block is filled up with zeros."""
    import torch

    rows, columns = matrix.shape
    blocks, size = grid.blocks(columns), grid.block(columns)
    if missing := blocks * size - columns:
        matrix = torch.nn.functional.pad(matrix, (0, missing))
    return matrix.reshape(rows, blocks, size)


def quantize(
    weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, grid: Grid, *, even: bool = False
) -> Quantized:
    """The nearest codes of a float32 matrix (rows, columns) under given scales and zero points (rows, blocks).

    Args:
        even: halves go to the even code instead of away from zero. ONNX Runtime's own quantizer does the latter.
    """
    import torch

    rows, columns = weight.shape
    inverse = torch.where(scales == 0, scales, 1 / scales)
    zero = torch.full_like(scales, grid.middle) if zeros is None else zeros.float()
    found = in_blocks(weight, grid) * inverse[..., None] + zero[..., None]
    found = found.round_() if even else found.add_(0.5).floor_()
    codes = found.clamp_(0, grid.top).to(torch.uint8).reshape(rows, -1)[:, :columns]
    return Quantized(grid, codes.contiguous(), scales, zeros)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes along the last axis as bytes, the first of two 4-bit codes in the low half; an odd end gets a zero."""
    import torch

    if bits == 8:
        return codes.contiguous()
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """What `pack` packed: uint8 codes along the last axis, `count` of them."""
    import torch

    if bits == 4:
        packed = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    return packed[..., :count].contiguous()


def unpacked(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, grid: Grid, columns: int
) -> Quantized:
    """A matrix from the inputs of a `MatMulNBits` node, in whatever shape the node has them.

    Args:
        codes: packed uint8, `rows * blocks * bytes of a block` values, row by row.
        scales: `rows * blocks` float32.
        zeros: packed uint8, `rows * ceil(blocks * bits / 8)` values, or None.
        columns: the matrix's columns (attribute K).
    """
    blocks = grid.blocks(columns)
    rows = scales.numel() // blocks
    filled = unpack(codes.reshape(rows, -1), grid.bits, blocks * grid.block(columns))
    found = None if zeros is None else unpack(zeros.reshape(rows, -1), grid.bits, blocks)
    return Quantized(grid, filled[:, :columns].contiguous(), scales.reshape(rows, blocks), found)
