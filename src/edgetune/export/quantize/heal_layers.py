"""Linear layers whose weights stay on their grid while they learn: codes by rounding a latent weight, and block scales.

A matrix is (round(code + place + B·A) - zero) · scale · exp(stretch). `place` says where in its cell the float weight
lies, so that before the first step each code is the one that was given. The rounding passes gradients straight through
(Bengio et al., arXiv 1308.3432); scales learn with the weights that they make (Esser et al., arXiv 1902.08153).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from edgetune.errors import InputError
from edgetune.export.quantize.grid import Quantized, in_blocks
from edgetune.export.quantize.plan import EMBEDDING, HEAD, parts_of

_CHUNK = 1 << 18  # weights that are made at once: the working copies stay in the cache
_INSIDE = 0.45  # of a cell, at most, between a code and its latent weight: the edge is at 0.5


class Matrix(torch.nn.Module):
    """One matrix (rows, columns) on its grid.

    Attributes:
        stretch: (rows, blocks) float32, the logarithm of each scale's change.
        a, b: (rank, columns) and (rows, rank) float32, in units of codes; None where only scales learn.

    Args:
        found: codes and scales to start from.
        latent: the float weight (rows, columns); None where codes stay.
        rank: of B·A.
        draw: random numbers for A.
    """

    def __init__(
        self, found: Quantized, latent: torch.Tensor | None, rank: int, draw: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.grid, (self.rows, self.columns) = found.grid, found.codes.shape
        self.codes = in_blocks(found.codes, found.grid)
        self.scales = found.scales
        self.zeros = torch.full_like(found.scales, found.grid.middle) if found.zeros is None else found.zeros.float()
        self.found = found
        self.stretch = torch.nn.Parameter(torch.zeros_like(found.scales))
        self.a: torch.nn.Parameter | None = None
        self.b: torch.nn.Parameter | None = None
        self.place: torch.Tensor | None = None
        if latent is not None and rank:
            self.place = self._place(latent)
            self.a = torch.nn.Parameter(torch.randn(rank, self.columns, generator=draw) / rank**0.5)
            self.b = torch.nn.Parameter(torch.zeros(self.rows, rank))

    def _place(self, latent: torch.Tensor) -> torch.Tensor:
        """Where in their cells the float weights lie, (rows, blocks, size) float16; see `cells`."""
        found = torch.empty(self.codes.shape, dtype=torch.float16)
        inverse = torch.where(self.scales == 0, self.scales, 1 / self.scales)
        for part in self._parts():
            found[part] = cells(
                in_blocks(latent[part].float(), self.grid), self.codes[part], inverse[part], self.zeros[part]
            )
        return found

    def _parts(self) -> list[slice]:
        step = max(1, _CHUNK // self.codes[0].numel())
        return [slice(start, start + step) for start in range(0, self.rows, step)]

    def _codes(self, part: slice) -> torch.Tensor:
        """Codes of some rows (n, blocks, size), float32."""
        if self.place is None or self.a is None or self.b is None:
            return self.codes[part].float()
        moved = in_blocks(self.b[part] @ self.a, self.grid).add_(self.place[part]).round_()
        return moved.add_(self.codes[part]).clamp_(0, self.grid.top)

    @torch.no_grad()
    def write(self, out: torch.Tensor) -> None:
        """Put the weights (rows, columns) into `out`."""
        scales = self._scales()
        for part in self._parts():
            made = self._codes(part).sub_(self.zeros[part, :, None]).mul_(scales[part, :, None])
            out[part] = made.flatten(1)[:, : self.columns]

    def _scales(self) -> torch.Tensor:
        return self.scales * self.stretch.exp()

    @torch.no_grad()
    def quantized(self) -> Quantized:
        """The matrix as it is now, on its grid."""
        parts = [self._codes(part).to(torch.uint8).flatten(1)[:, : self.columns] for part in self._parts()]
        return Quantized(self.grid, torch.cat(parts).contiguous(), self._scales(), self.found.zeros)

    def learns(self) -> list[torch.nn.Parameter]:
        """What learns, in the order of `slopes`."""
        return [self.stretch] if self.a is None or self.b is None else [self.stretch, self.a, self.b]

    def slopes(self, slope: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
        """The gradients of what learns from that of the weights (rows, columns).

        A weight is its scale times whole numbers, so it is its own derivative by the scale's logarithm.
        """
        found = [in_blocks(slope * weight, self.grid).sum(-1, dtype=torch.float32)]
        if self.a is not None and self.b is not None:
            scales = self._scales().to(slope.dtype)
            pull = in_blocks(slope, self.grid).mul(scales[..., None]).flatten(1)[:, : self.columns]
            found += [(self.b.to(pull.dtype).t() @ pull).float(), (pull @ self.a.to(pull.dtype).t()).float()]
        return found


def cells(blocks: torch.Tensor, codes: torch.Tensor, inverse: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """Where in the cells of their codes float weights lie, in codes, within (-0.5, 0.5).

    A weight outside its cell (GPTQ moves codes on purpose) is put a little inside the edge next to it.

    Args:
        blocks: the weights (rows, blocks, size) float32.
        codes: of the same shape, uint8.
        inverse, zeros: (rows, blocks) float32: what the weights are multiplied with, and the zero points.
    """
    found = blocks * inverse[..., None]
    return found.add_(zeros[..., None]).sub_(codes).clamp_(-_INSIDE, _INSIDE)


class Place:
    """Which row of the batch each token of a pass belongs to: int8 activations have a range a row.

    Attributes:
        row: (tokens,) int64 of packed rows; None where the first axis of the activations is the row.
        rows: how many rows are packed.
    """

    row: torch.Tensor | None = None
    rows = 0

    def set(self, lengths: Sequence[int] | None) -> None:
        """Tell of packed rows by their lengths, or of padded ones."""
        self.row, self.rows = None, 0
        if lengths is not None:
            self.row, self.rows = torch.repeat_interleave(torch.tensor(list(lengths))), len(lengths)


def as_int8(x: torch.Tensor, place: Place) -> torch.Tensor:
    """Activations (B, S, columns) as `DynamicQuantizeLinear` would have them: uint8 over a row's own range, with zero."""
    low, high = x.amin(-1).float().clamp_(max=0), x.amax(-1).float().clamp_(min=0)
    if place.row is None:
        low, high = low.amin(-1, keepdim=True), high.amax(-1, keepdim=True)
    else:
        index, zero = place.row, torch.zeros(place.rows)
        low = zero.scatter_reduce(0, index, low.flatten(), "amin")[index].view_as(low)
        high = zero.scatter_reduce(0, index, high.flatten(), "amax")[index].view_as(high)
    scale = ((high - low) / 255).clamp_(min=1e-30)[..., None]
    zero = (low[..., None] / scale).round_().neg_()
    codes = (x / scale).round_().add_(zero).clamp_(0, 255)
    return codes.sub_(zero).mul_(scale).to(x.dtype)


class _Product(torch.autograd.Function):
    """y = x·Wᵀ + bias; the slope of W goes to what makes W, and never lives longer than that takes."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Any, *learns: torch.Tensor) -> torch.Tensor:
        if layer.int8_inputs:
            x = as_int8(x, layer.where)
        ctx.save_for_backward(x)
        ctx.layer = layer
        return torch.nn.functional.linear(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (x,), layer, dy = ctx.saved_tensors, ctx.layer, grads[0]
        dx = dy @ layer.weight if ctx.needs_input_grad[0] else None
        slope = dy.flatten(0, -2).t() @ x.flatten(0, -2)
        rows = [matrix.rows for matrix in layer.matrices]
        pieces = zip(layer.matrices, slope.split(rows), layer.weight.split(rows), strict=True)
        return dx, None, *(one for matrix, piece, own in pieces for one in matrix.slopes(piece, own))


class GridLinear(torch.nn.Linear):
    """A linear layer in the place of a model's own, its weight made of one matrix, or of several below each other.

    Attributes:
        matrices: what its weight is made of.
        where: the rows of the pass.
        int8_inputs: whether its inputs are quantized, too.
    """

    matrices: Any
    where: Place
    int8_inputs: bool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, S, in) to (B, S, out)."""
        found: torch.Tensor = _Product.apply(x, self, *(one for matrix in self.matrices for one in matrix.learns()))
        return found

    def refresh(self) -> None:
        """Make the weight anew."""
        for matrix, piece in zip(
            self.matrices, self.weight.data.split([matrix.rows for matrix in self.matrices]), strict=True
        ):
            matrix.write(piece)


class _Lookup(torch.autograd.Function):
    """Rows of the embedding; their slope goes to the scales."""

    @staticmethod
    def forward(ctx: Any, ids: torch.Tensor, layer: Any, stretch: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(ids, found := torch.nn.functional.embedding(ids, layer.weight))
        ctx.layer, ctx.shape = layer, stretch.shape
        return found

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        ids, found = ctx.saved_tensors
        each = in_blocks((grads[0] * found).flatten(0, -2), ctx.layer.matrices[0].grid).sum(-1, dtype=torch.float32)
        return None, None, torch.zeros(ctx.shape).index_add_(0, ids.flatten(), each)


class GridEmbedding(torch.nn.Embedding):
    """An embedding in the place of a model's own, on its grid; only its scales learn.

    Attributes:
        matrices: the one matrix that its weight is made of, which may be the head's.
    """

    matrices: Any

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (B, S) to (B, S, hidden)."""
        found: torch.Tensor = _Lookup.apply(ids, self, self.matrices[0].stretch)
        return found


def install(model: Any, found: dict[str, Quantized], rank: int, seed: int, where: Place) -> dict[str, Matrix]:
    """Put every matrix of `found` on its grid, in the model's own layers.

    Args:
        model: transformers model with its float weights, which become those of the grids.
        found: by full module name; a tied embedding is `lm_head`.
        rank: of what moves the codes; 0 for scales alone. Embedding and head have none.
        seed: of the first A.
        where: the rows of a pass, which the caller sets before each.

    Returns:
        The matrices, by the names of `found`.

    Raises:
        InputError: a matrix that the model does not have.
    """
    made: dict[str, Matrix] = {}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = bool(model.config.get_text_config().tie_word_embeddings)
    for number, (path, module) in enumerate(model.named_modules()):
        if not isinstance(module, torch.nn.Linear) or module is head:
            continue
        parts = parts_of(path, module.weight.data, model.config)
        if not any(name in found for name, _ in parts):
            continue
        if missing := [name for name, _ in parts if name not in found]:
            raise InputError(f"{missing[0]} is not quantized, and the rest of {path} is", fix="quantize all of it")
        for index, (name, weight) in enumerate(parts):
            draw = torch.Generator().manual_seed(seed + 8 * number + index)
            made[name] = Matrix(found[name], weight, rank, draw)
        _become(module, GridLinear, [made[name] for name, _ in parts])
        assert isinstance(module, GridLinear)
        module.weight = torch.nn.Parameter(torch.empty_like(module.weight.data), requires_grad=False)
        module.where = where
        module.int8_inputs = any(found[name].grid.activations == "int8" for name, _ in parts)
        module.refresh()
    for name, module in ((HEAD, head), (EMBEDDING, embedding)):
        if name in found and module is not None:
            made[name] = Matrix(found[name], None, 0)
            module.weight = torch.nn.Parameter(torch.empty_like(module.weight.data), requires_grad=False)
            made[name].write(module.weight.data)
    if tied and HEAD in made:
        embedding.weight = head.weight
    source = made.get(HEAD if tied else EMBEDDING)
    if source is not None and type(embedding) is torch.nn.Embedding:
        _become(embedding, GridEmbedding, [source])
    if unknown := sorted(set(found) - set(made)):
        raise InputError(f"the model has no matrix {unknown[0]}", fix="heal what was quantized from this very model")
    return made


def _become(module: Any, kind: type[torch.nn.Module], matrices: list[Matrix]) -> None:
    module.__class__ = kind  # the module stays the same object: names and ties hold
    module.matrices = tuple(matrices)  # not registered: they have names of their own
