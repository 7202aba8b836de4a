"""LoRA that learns through the export's rounding: the products are those of W + s·B·A on the target's grid.

The rounding passes gradients straight through (Bengio et al., arXiv 1308.3432), so A and B learn as they do without it,
from the loss that the rounded weights have. Scales and zero points are the range of each block of the weight as it is now
(`rtn.min_max`): a function of the merged weight alone, so the export finds the very same codes. The embedding and the
head, which have no adapter, are rounded once. What the target computes with int8 activations stays as it is: its 8-bit
weights are chosen together with the scaling of its inputs, at export.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from edgetune.errors import InputError
from edgetune.export.quantize.calibrate import decoder_layers, fitted
from edgetune.export.quantize.grid import Grid
from edgetune.export.quantize.plan import EMBEDDING, HEAD, Plan, parts_of
from edgetune.export.quantize.rtn import min_max_weights
from edgetune.export.quantize.weights import Weights
from edgetune.models import Base
from edgetune.train.lora import FusedLinear

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
        wide: W (out, in) float32, as it is merged.
        grids: rows and grid of each part of a fused matrix, of one part for any other; None for one that stays as it is.
        rounded: Q(W + s·B·A) in the base's dtype, for A and B as they were when it was made.
    """

    rounding: Rounding | None = None
    wide: torch.Tensor
    grids: list[tuple[int, Grid | None]]
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
        whole = self.wide + self.get_delta_weight(name)  # in the words of peft's merge, for the same bits
        _round(whole, self.grids, self.rounded)
        self.seen = (a.clone(), b.clone())

    seen: tuple[torch.Tensor, torch.Tensor] | None = None


@dataclass
class _Fixed:
    """A matrix without an adapter: its parameter, and both of its values."""

    parameter: torch.nn.Parameter
    plain: torch.Tensor
    rounded: torch.Tensor


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
        layers = [module for module in model.modules() if isinstance(module, GridLora) and module.rounding is self]
        own = {parameter.data_ptr() for parameter in model.parameters()}
        kept = [*(one.rounded for one in layers), *(one.wide for one in layers), *(one.rounded for one in self.fixed)]
        kept += [one.plain for one in self.fixed]
        return float(sum(tensor.nbytes for tensor in kept if tensor.data_ptr() not in own))

    def plain(self, parameter: torch.Tensor) -> torch.Tensor:
        """The values of a parameter without rounding."""
        return next((one.plain for one in self.fixed if one.parameter is parameter), parameter.data)


def register(config: Any) -> None:
    """Have peft put `GridLora` on each `torch.nn.Linear` that `config` (a LoraConfig) adapts."""
    config._register_custom_module({torch.nn.Linear: GridLora})


def install(model: Any, plan: Plan, base: Base) -> Rounding:
    """Let a model compute with the weights that an export by this plan would have.

    Args:
        model: peft's model with `GridLora` layers, from `method.build`.
        plan: the target's; its method does not count.
        base: whose weights are rounded as they were published, in float32, whatever the model computes in.

    Raises:
        InputError: a model whose layers are not known, or grids with which the export would change other matrices too.
    """
    core, rounding = model.get_base_model(), Rounding()
    layers, prefix = decoder_layers(core)
    head, embedding = core.get_output_embeddings(), core.get_input_embeddings()
    if head is None:
        raise InputError("the model has no head that is known", where="train.quantization_aware", fix="leave it off")
    _check(plan, [f"{prefix}.{number}" for number in range(len(layers))])
    with Weights(base.path) as weights:
        for number, layer in enumerate(layers):
            for path, module in _matrices(layer):
                name = f"{prefix}.{number}.{path}"
                wide = weights.get(f"{name}.weight")
                grids = _grids(name, wide, plan, core.config, rounding)
                if not any(grid for _, grid in grids):
                    continue
                if isinstance(module, GridLora):
                    own = module.get_base_layer().weight.data
                    module.wide = own if own.dtype == torch.float32 else wide.to(own.device)
                    module.grids, module.rounded, module.rounding = grids, torch.empty_like(own), rounding
                else:
                    rounding.fixed.append(_fixed(module.weight, wide, grids))
        tied = head.weight is embedding.weight
        for name, module in ((EMBEDDING, embedding), *(() if tied else ((HEAD, head),))):
            wide = weights.get(f"{name}.weight")
            called = HEAD if tied else name
            rounding.fixed.append(_fixed(module.weight, wide, _grids(called, wide, plan, core.config, rounding)))
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


def _grids(
    name: str, weight: torch.Tensor, plan: Plan, config: Any, rounding: Rounding
) -> list[tuple[int, Grid | None]]:
    found: list[tuple[int, Grid | None]] = []
    for part, piece in parts_of(name, weight, config):
        grid = fitted(part, plan.grid(part), piece.shape[1])
        learns = grid.activations == "float"
        if learns:
            rounding.grids[part] = grid
        found.append((len(piece), grid if learns else None))
    return found


def _round(weight: torch.Tensor, grids: list[tuple[int, Grid | None]], out: torch.Tensor) -> None:
    rows = [count for count, _ in grids]
    for (_, grid), piece, place in zip(grids, weight.split(rows), out.split(rows), strict=True):
        if grid is None:
            place.copy_(piece)
        else:
            min_max_weights(piece, grid, place)


def _fixed(parameter: torch.nn.Parameter, wide: torch.Tensor, grids: list[tuple[int, Grid | None]]) -> _Fixed:
    rounded = torch.empty_like(parameter.data)
    _round(wide.to(rounded.device), grids, rounded)
    return _Fixed(parameter, parameter.data, rounded)


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
