"""LoRA that learns through the export's rounding: the products are those of W + s·B·A on the target's grid.

It begins with the codes, scales and zero points that the export would choose for the base (`start`: GPTQ, where the target
says so), and what the adapter adds moves codes: round(code + place + s·B·A / scale), where `place` says where in its cell the
base's weight lies. The rounding passes gradients straight through (Bengio et al., arXiv 1308.3432), so A and B learn as
they do without it, from the loss that the rounded weights have. The codes at the end are kept beside the adapter, and are
what is exported. The embedding and the head, which have no adapter, stay as they began. What the target computes with int8
activations stays unrounded: its 8-bit weights are chosen together with the scaling of its inputs, at export.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from edgetune.errors import InputError
from edgetune.export.quantize import kept
from edgetune.export.quantize.calibrate import decoder_layers, quantize_model
from edgetune.export.quantize.grid import Grid, Quantized, in_blocks
from edgetune.export.quantize.heal_layers import cells
from edgetune.export.quantize.plan import EMBEDDING, HEAD, Plan, parts_of
from edgetune.export.quantize.weights import Weights
from edgetune.models import Base
from edgetune.train.lora import FusedLinear

_CHUNK = 1 << 18  # weights that are made at once: the working copies stay in the cache
_SHARED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("up_proj", "down_proj"))


class _Product(torch.autograd.Function):
    """y = x·Q(W + s·B·A)ᵀ (+ bias); A and B get the gradient of W + s·B·A, which is never made."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, layer: Any, bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, scale: float
    ) -> torch.Tensor:
        a, b = a.to(x.dtype), (b * scale).to(x.dtype)
        ctx.save_for_backward(x, a, b)
        ctx.layer, ctx.scale = layer, scale
        return torch.nn.functional.linear(x, layer.rounded, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, a, b = ctx.saved_tensors
        dy = grads[0]
        dx = dy @ ctx.layer.rounded if ctx.needs_input_grad[0] else None
        return dx, None, None, ((dy @ b).t() @ x).float(), (dy.t() @ (x @ a.t())).float().mul_(ctx.scale), None


class GridLora(FusedLinear):
    """peft's LoRA layer whose products are those of the rounded sum, while its `Rounding` is on.

    Attributes:
        rounding: of the model; None until `install`.
        parts: of the matrix: its rows, its name, and what it begins with; None for one that stays as it is.
        rounded: Q(W + s·B·A) in the base's dtype, for A and B as they were when it was made.
    """

    rounding: Rounding | None = None
    parts: list[_Part]
    rounded: torch.Tensor

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As peft's: x (…, in) in the base's dtype to (…, out)."""
        if self.rounding is None or not self.rounding.on:
            return super().forward(x, *args, **kwargs)
        base, name = self.get_base_layer(), self.active_adapters[0]
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        self._refresh(a.detach(), b.detach(), name)
        x2 = x.reshape(-1, x.shape[-1]).to(base.weight.dtype)
        y = _Product.apply(x2, self, base.bias, a, b, self.scaling[name])
        return y.view(*x.shape[:-1], -1).to(x.dtype)

    @torch.no_grad()
    def _refresh(self, a: torch.Tensor, b: torch.Tensor, name: str) -> None:
        """Round again where A or B has changed. They are compared: fused optimizers do not count up their versions."""
        if self.seen is not None and torch.equal(a, self.seen[0]) and torch.equal(b, self.seen[1]):
            return
        delta, plain = self.get_delta_weight(name).float(), self.get_base_layer().weight.data
        for part in self.parts:
            out = self.rounded[part.place]
            if part.begun is None:
                torch.add(plain[part.place], delta[part.place].to(out.dtype), out=out)
            else:
                part.begun.write(delta[part.place], out)
        self.seen = (a.clone(), b.clone())

    @torch.no_grad()
    def quantized(self) -> dict[str, Quantized]:
        """Each rounded part on its grid, for A and B as they are."""
        delta = self.get_delta_weight(self.active_adapters[0]).float()
        return {part.name: part.begun.quantized(delta[part.place]) for part in self.parts if part.begun is not None}

    seen: tuple[torch.Tensor, torch.Tensor] | None = None


class Begun:
    """A matrix on its grid, whose codes are moved by what is added to its weights.

    Args:
        found: codes, scales and zero points to begin with.
        weight: (rows, columns) float32, which they stand for.
    """

    def __init__(self, found: Quantized, weight: torch.Tensor) -> None:
        self.grid, self.found = found.grid, found
        self.scales = found.scales.to(weight.device)
        zeros = torch.full_like(found.scales, found.grid.middle) if found.zeros is None else found.zeros.float()
        self.zeros = zeros.to(weight.device)
        self.inverse = torch.where(self.scales == 0, self.scales, 1 / self.scales)
        self.codes = in_blocks(found.codes, found.grid).to(weight.device)
        self.place = torch.empty(self.codes.shape, dtype=torch.float16, device=weight.device)
        for part in self._parts():
            blocks = in_blocks(weight[part], self.grid)
            self.place[part] = cells(blocks, self.codes[part], self.inverse[part], self.zeros[part])

    def _parts(self) -> list[slice]:
        step = max(1, _CHUNK // self.found.codes.shape[1])
        return [slice(start, start + step) for start in range(0, len(self.scales), step)]

    def _codes(self, delta: torch.Tensor, part: slice) -> torch.Tensor:
        """Codes of some rows (n, blocks, size), float32, with `delta` (n, columns) added to the weights."""
        moved = in_blocks(delta, self.grid) * self.inverse[part, :, None]
        return moved.add_(self.place[part]).round_().add_(self.codes[part]).clamp_(0, self.grid.top)

    def write(self, delta: torch.Tensor, out: torch.Tensor) -> None:
        """Put the rounded weights, with `delta` (rows, columns) float32 added, into `out`."""
        for part in self._parts():
            made = self._codes(delta[part], part).sub_(self.zeros[part, :, None]).mul_(self.scales[part, :, None])
            out[part] = made.flatten(1)[:, : delta.shape[1]]

    def quantized(self, delta: torch.Tensor) -> Quantized:
        """The same as codes."""
        parts = [
            self._codes(delta[part], part).to(torch.uint8).flatten(1)[:, : delta.shape[1]] for part in self._parts()
        ]
        return Quantized(self.grid, torch.cat(parts).cpu().contiguous(), self.found.scales, self.found.zeros)


@dataclass(frozen=True)
class _Part:
    """A part of a matrix: its name, its rows, and what it begins with."""

    name: str
    place: slice
    begun: Begun | None


@dataclass
class _Fixed:
    """A matrix without an adapter: its parameter, both of its values, and its parts on their grids."""

    parameter: torch.nn.Parameter
    plain: torch.Tensor
    rounded: torch.Tensor
    parts: dict[str, Quantized]


@dataclass
class Rounding:
    """Whether a model computes with rounded weights now.

    Attributes:
        on: set by `off`.
        grids: the grid of each matrix that is rounded, by full name.
    """

    on: bool = False
    grids: dict[str, Grid] = field(default_factory=dict)
    fixed: list[_Fixed] = field(default_factory=list)

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """The same model without rounding, while the block runs."""
        self.turn(False)
        try:
            yield
        finally:
            self.turn(True)

    def turn(self, on: bool) -> None:
        """Compute with rounded weights from here on, or with plain ones."""
        self.on = on
        for one in self.fixed:
            one.parameter.data = one.rounded if on else one.plain

    def bytes(self, model: Any) -> float:
        """What it keeps beside the model's own weights."""
        layers = self._layers(model)
        own = {parameter.data_ptr() for parameter in model.parameters()}
        held = [
            *(one.rounded for one in layers),
            *(one.rounded for one in self.fixed),
            *(one.plain for one in self.fixed),
        ]
        begun = [part.begun for one in layers for part in one.parts if part.begun is not None]
        held += [tensor for one in begun for tensor in (one.codes, one.place, one.scales, one.zeros, one.inverse)]
        return float(sum(tensor.nbytes for tensor in held if tensor.data_ptr() not in own))

    def _layers(self, model: Any) -> list[GridLora]:
        return [module for module in model.modules() if isinstance(module, GridLora) and module.rounding is self]

    def quantized(self, model: Any) -> dict[str, Quantized]:
        """Every matrix that is rounded, by its full name, as the model is now."""
        found: dict[str, Quantized] = {}
        for layer in self._layers(model):
            found |= layer.quantized()
        for one in self.fixed:
            found |= one.parts
        return found

    def plain(self, parameter: torch.Tensor) -> torch.Tensor:
        """The values of a parameter without rounding."""
        return next((one.plain for one in self.fixed if one.parameter is parameter), parameter.data)


def register(config: Any) -> None:
    """Have peft put `GridLora` on each `torch.nn.Linear` that `config` (a LoraConfig) adapts."""
    config._register_custom_module({torch.nn.Linear: GridLora})


def start(
    plan: Plan, base: Base, rows: Sequence[Sequence[int]], file: Path, *, trust_remote_code: bool = False
) -> dict[str, Quantized]:
    """What training begins with: the base's matrices as the export would have them, by their full names.

    Args:
        plan: the target's.
        base: whose weights are rounded as they were published, in float32, whatever the model computes in.
        rows: to calibrate on, token ids.
        file: keeps them for a training that goes on later.
    """
    if not file.is_file():
        found: dict[str, Quantized] = {}
        quantize_model(base.path, plan, rows, found.__setitem__, trust_remote_code=trust_remote_code)
        kept.save(file, {name: one for name, one in found.items() if plan.grid(name).activations == "float"})
    return kept.load(file)


def nearest(plan: Plan, base: Base) -> dict[str, Quantized]:
    """The same without rows: codes by rounding to nearest."""
    found: dict[str, Quantized] = {}
    wide = {name: _by_weight(grid) for name, grid in plan.modules.items()}
    quantize_model(base.path, Plan(_by_weight(plan.default), wide, "min_max"), (), found.__setitem__)
    return {name: one for name, one in found.items() if plan.grid(name).activations == "float"}


def _by_weight(grid: Grid) -> Grid:
    return grid if grid.activations == "float" else Grid(8, 32)


def install(model: Any, plan: Plan, base: Base, begin: Callable[[], Mapping[str, Quantized]]) -> Rounding:
    """Let a model compute with the weights that an export by this plan would have.

    Args:
        model: peft's model with `GridLora` layers, from `method.build`.
        plan: the target's.
        base: whose weights the model has.
        begin: gives what it begins with, as `start` does; called once nothing is left to refuse.

    Raises:
        InputError: a model whose layers are not known, or grids with which the export would change other matrices too.
    """
    core, rounding = model.get_base_model(), Rounding()
    layers, prefix = decoder_layers(core)
    head, embedding = core.get_output_embeddings(), core.get_input_embeddings()
    if head is None:
        raise InputError("the model has no head that is known", where="train.quantization_aware", fix="leave it off")
    _check(plan, [f"{prefix}.{number}" for number in range(len(layers))])
    begun = begin()
    with Weights(base.path) as weights:
        for number, layer in enumerate(layers):
            for path, module in _matrices(layer):
                name = f"{prefix}.{number}.{path}"
                parts = parts_of(name, weights.get(f"{name}.weight"), core.config)
                if not any(part in begun for part, _ in parts):
                    continue
                if isinstance(module, GridLora):
                    own = module.get_base_layer().weight.data
                    module.parts = _begin(parts, begun, own.device)
                    module.rounded, module.rounding = torch.empty_like(own), rounding
                else:
                    rounding.fixed.append(_fixed(module.weight, parts, begun))
        tied = head.weight is embedding.weight
        for name, module in ((EMBEDDING, embedding), *(() if tied else ((HEAD, head),))):
            whole = weights.get(f"{name}.weight")
            rounding.fixed.append(_fixed(module.weight, [(HEAD if tied else name, whole)], begun))
    rounding.grids = {name: one.grid for name, one in begun.items()}
    rounding.turn(True)
    return rounding


def _matrices(layer: Any) -> Iterator[tuple[str, Any]]:
    """The linear layers of a decoder layer, each once: adapted ones without what they are made of."""
    inside: tuple[str, ...] = ()
    for path, module in layer.named_modules():
        if path.startswith(inside or "\0"):
            continue
        if isinstance(module, GridLora):
            inside = (*inside, f"{path}.")
            yield path, module
        elif isinstance(module, torch.nn.Linear):
            yield path, module


def _begin(parts: Sequence[tuple[str, torch.Tensor]], begun: Mapping[str, Quantized], device: Any) -> list[_Part]:
    found, first = [], 0
    for name, piece in parts:
        one = begun.get(name)
        made = None if one is None else Begun(one, piece.to(device))
        found.append(_Part(name, slice(first, first + len(piece)), made))
        first += len(piece)
    return found


def _fixed(
    parameter: torch.nn.Parameter, parts: Sequence[tuple[str, torch.Tensor]], begun: Mapping[str, Quantized]
) -> _Fixed:
    pieces = [begun[name].dequantize() if name in begun else piece for name, piece in parts]
    rounded = torch.cat(pieces).to(parameter.device, parameter.dtype)
    return _Fixed(parameter, parameter.data, rounded, {name: begun[name] for name, _ in parts if name in begun})


def _check(plan: Plan, layers: list[str]) -> None:
    """Refuse int8 activations beside float ones on the same inputs: scaling them would change the others' weights."""
    for layer in layers:
        for names in _SHARED:
            grids = {name: plan.grid(f"{layer}.{_OWNER[name]}.{name}") for name in names}
            int8 = [name for name, grid in grids.items() if grid.activations == "int8"]
            others = [name for name in names if name not in int8]
            if int8 and others and (names[-1] != "down_proj" or int8 == ["down_proj"]):
                raise InputError(
                    f"the target scales the inputs of {int8[0]} (activations: int8), and with them the weights of "
                    f"{others[0]}, which is trained on a grid of its own",
                    where="export.target",
                    fix=f"give {others[0]} int8 activations too, or {int8[0]} none; or train.quantization_aware=false",
                )


_OWNER = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp") | dict.fromkeys(
    ("q_proj", "k_proj", "v_proj"), "self_attn"
)
