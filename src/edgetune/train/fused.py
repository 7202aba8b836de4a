"""RMSNorm and the gated feed-forward layer with their forward and backward passes written out.

Autograd keeps every float32 step of a norm and each factor of the gate. Here a norm keeps its input and a number a row,
the gate its two factors: less memory, and for the norms half the time.
"""

from __future__ import annotations

from typing import Any

import torch


class _Normalized(torch.autograd.Function):
    """x / √(mean(x²) + ε) · w, computed in float32 (arXiv 1910.07467). Kept for the backward pass: x and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        wide = x.float()
        mean = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean.add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, weight, scale = ctx.saved_tensors
        dy = grads[0]
        unit = x.float() * scale
        wide = (dy * weight).float()
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = (dy.float() * unit).flatten(0, -2).sum(0).to(weight.dtype)
        along = torch.linalg.vecdot(wide, unit).div_(x.shape[-1]).unsqueeze(-1)
        return wide.sub_(unit.mul_(along)).mul_(scale).to(x.dtype), dweight, None


class FusedRMSNorm(torch.nn.Module):
    """An RMSNorm of transformers, in its place, with `_Normalized` as its forward pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (…, hidden), normalized over its last axis."""
        epsilon: Any = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
        return _Normalized.apply(x, self.weight, epsilon)


class _Gated(torch.autograd.Function):
    """silu(gate) · up (arXiv 2002.05202). Kept for the backward pass: gate and up."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        dy = grads[0]
        return torch.ops.aten.silu_backward(dy * up, gate), torch.nn.functional.silu(gate).mul_(dy)


class FusedMLP(torch.nn.Module):
    """A gated feed-forward layer of transformers, in its place, with `_Gated` between its linear layers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (…, hidden) to (…, hidden)."""
        return self.down_proj(_Gated.apply(self.gate_proj(x), self.up_proj(x)))  # type: ignore[operator]


def install(model: Any) -> int:
    """Let the classes above take the place of every module that they compute the same as.

    A module stays the same object: what is saved, tied or hooked is unchanged. Modules of another formula (`1 + w` in a
    norm, another activation in a gate) give another result on a test row, and stay as they are.

    Returns:
        how many.
    """
    count, like = 0, _base_weight(model)
    for module in model.modules():
        name = type(module).__name__
        if name.endswith("RMSNorm") and _is_norm(module):
            count += _swap(module, FusedRMSNorm, _row(like, module.weight.shape[-1]))
        elif name.endswith("MLP") and _is_gated(module):
            count += _swap(module, FusedMLP, _row(like, module.gate_proj.in_features))
    return count


def _base_weight(model: Any) -> torch.Tensor:
    """A weight of the dtype and on the device that the model computes in: a frozen one, where some are."""
    weights = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    return next((weight for weight in weights if not weight.requires_grad), weights[0])


def _row(like: torch.Tensor, width: int) -> torch.Tensor:
    return torch.linspace(-3, 3, 2 * width, device=like.device, dtype=like.dtype).view(2, -1)


def _is_norm(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and (hasattr(module, "variance_epsilon") or hasattr(module, "eps"))


def _is_gated(module: Any) -> bool:
    return {name for name, _ in module.named_children()} >= {"gate_proj", "up_proj", "down_proj"}


def _swap(module: Any, fused: type[torch.nn.Module], x: torch.Tensor) -> bool:
    before, training = type(module), module.training
    module.eval()
    with torch.no_grad():
        wanted = module(x)
        module.__class__ = fused
        found = module(x)
    module.train(training)
    near = 2e-2 if x.dtype.itemsize < 4 else 1e-5
    if wanted.dtype == found.dtype and torch.allclose(wanted, found, rtol=near, atol=near):
        return True
    module.__class__ = before
    return False
