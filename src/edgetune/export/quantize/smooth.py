"""Makes a layer's inputs easy to round to 8 bits, without changing what the layer computes.

A few channels of a linear layer's inputs are far larger than the others, and where the whole tensor gets one scale they
leave the others few steps. So each channel is divided by a number and its column of weights multiplied by it; what makes
the channel (a norm, or `up_proj` before `down_proj`) is divided in its own weights. See Xiao et al., "SmoothQuant",
arXiv 2211.10438. The paper's one exponent for all layers is chosen for each layer here, by the error of its outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgetune.export.quantize.grid import Grid
from edgetune.export.quantize.rtn import min_max

if TYPE_CHECKING:
    import torch

_SHARES = (0.5, 0.6, 0.7, 0.8, 0.9)  # of the difficulty that goes from the inputs into the weights
_LEAST = 1e-5  # of a channel's largest value: a channel that is always zero is not divided by zero


@dataclass
class Group:
    """Linear layers of a decoder layer that read the very same tensor.

    Attributes:
        paths: their names within the decoder layer.
        maker: name of the norm or of the linear layer whose output channels the inputs are, or None.
        peaks: (columns,) float32, each channel's largest absolute value over all rows.
        inputs: the inputs of some rows, each (tokens, columns) float32.
    """

    paths: list[str]
    maker: str | None
    peaks: torch.Tensor = field(init=False)
    inputs: list[torch.Tensor] = field(default_factory=list)


@dataclass
class Folded:
    """What smoothing changed of the matrices' inputs and outputs, for what is computed beside them (adapters).

    Attributes:
        columns: by a matrix's full name, what its inputs were divided by (columns,).
        rows: by a matrix's full name, what its last outputs were divided by (rows,).
    """

    columns: dict[str, torch.Tensor] = field(default_factory=dict)
    rows: dict[str, torch.Tensor] = field(default_factory=dict)


def round_inputs(inputs: torch.Tensor) -> torch.Tensor:
    """A tensor as `DynamicQuantizeLinear` rounds it: 8 bits, one scale and one zero point, zero within the range."""
    low, high = float(inputs.min().clamp(max=0)), float(inputs.max().clamp(min=0))
    scale = (high - low) / 255 or 1.0
    zero = round(-low / scale)
    return ((inputs / scale).round_().add_(zero).clamp_(0, 255).sub_(zero)).mul_(scale)


def smooth(layer: Any, group: Group) -> tuple[float, torch.Tensor | None]:
    """Choose the group's channel scales and fold them into the layer's weights.

    Returns:
        The relative squared error of the group's outputs that rounding inputs and weights to 8 bits then brings, mean over
        tokens, and what was divided by (columns,), or None where nothing was changed.
    """
    import torch

    linears = [layer.get_submodule(path) for path in group.paths]
    weight = torch.cat([linear.weight for linear in linears])
    wanted = [inputs @ weight.T for inputs in group.inputs]
    best, chosen = _error(group.inputs, weight, wanted, torch.ones(weight.shape[1])), None
    if group.maker is None:
        return best, None
    widest = weight.abs().amax(0).clamp(min=_LEAST)
    for share in _SHARES:
        scales = group.peaks.clamp(min=_LEAST) ** share / widest ** (1 - share)
        scales /= scales.log().mean().exp()
        error = _error(group.inputs, weight, wanted, scales)
        if error < best:
            best, chosen = error, scales
    if chosen is not None:
        for linear in linears:
            linear.weight.mul_(chosen)
        divide(layer.get_submodule(group.maker), chosen)
    return best, chosen


def _error(
    inputs: Sequence[torch.Tensor], weight: torch.Tensor, wanted: Sequence[torch.Tensor], scales: torch.Tensor
) -> float:
    rounded = min_max(weight * scales, Grid(8, activations="int8")).dequantize()
    total, tokens = 0.0, 0
    for one, want in zip(inputs, wanted, strict=True):
        wrong = (round_inputs(one / scales) @ rounded.T).sub_(want).square_().sum(-1)
        total += float((wrong / want.square().sum(-1).clamp(min=1e-20)).sum())
        tokens += len(one)
    return total / tokens


def divide(maker: Any, scales: torch.Tensor) -> None:
    """Divide the channels that a norm or a linear layer makes; a fused `gate_up_proj` has the channels in its second half."""
    import torch

    if isinstance(maker, torch.nn.Linear):
        maker.weight[-len(scales) :].div_(scales[:, None])
        if maker.bias is not None:
            maker.bias[-len(scales) :].div_(scales)
    elif _shifted(maker):
        maker.weight.add_(1).div_(scales).sub_(1)
    else:
        maker.weight.div_(scales)
        if getattr(maker, "bias", None) is not None:
            maker.bias.div_(scales)


def _shifted(norm: Any) -> bool:
    """Whether a norm multiplies by 1 + weight, as Gemma's does."""
    import torch

    own = norm.weight.clone()
    norm.weight.zero_()
    some = torch.arange(1.0, len(own) + 1)[None]
    flat = norm(some) - (norm.bias if getattr(norm, "bias", None) is not None else 0)
    norm.weight.copy_(own)
    return bool(flat.abs().max() > 0)
