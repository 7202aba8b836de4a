"""The DoRA layer (arXiv 2402.09353): the LoRA layer of `lora.py`, its rows brought to lengths that are trained.

y = m / ‖W + s·B·A‖ · (W·x + s·B·(A·x)), the lengths ‖·‖ of the rows being constants for the gradient, as in the paper's
section 4.3. peft keeps several float32 copies of y for the backward pass; here y is kept once, in the base's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear

from edgetune.train.lora import _Product, x_device


class _Scaled(torch.autograd.Function):
    """z (T, out) · scale (out,), multiplied in float32: in bfloat16 a length near 1 could only change by 0.4 %."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(z, scale)
        return (z * scale).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        z, scale = ctx.saved_tensors
        dy = grads[0].float()
        return (dy * scale).to(z.dtype), (dy * z).sum(0)


def lengths(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """The lengths (out,) of the rows of W + s·B·A, float32, without that matrix: from W·Aᵀ and A·Aᵀ.

    Args:
        weight: W (out, in).
        a, b: (r, in) and (out, r), float32.
        scale: s.
    """
    square = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square_()
    cross = (weight @ a.t().to(weight.dtype)).float()
    change = 2 * scale * (cross * b).sum(1) + scale**2 * ((b @ (a @ a.t())) * b).sum(1)
    return (square + change).clamp_(min=0).sqrt_()


class FusedDora(Linear):
    """peft's DoRA layer on a frozen `torch.nn.Linear`; what is not covered here is left to peft."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As peft's: x (…, in) in the base's dtype to (…, out)."""
        name = self.active_adapters[0] if self.active_adapters else None
        if not self._plain(name, args, kwargs):
            return super().forward(x, *args, **kwargs)
        base, a, b = self.get_base_layer(), self.lora_A[name].weight, self.lora_B[name].weight
        with torch.no_grad():
            now = lengths(base.weight, a, b, self.scaling[name])
        x2 = x.reshape(-1, x.shape[-1]).to(base.weight.dtype)
        z = _Product.apply(x2, base.weight, None, a, b, self.scaling[name])
        y = _Scaled.apply(z, self.lora_magnitude_vector[name].weight / now)
        if base.bias is not None:  # is no part of what is scaled
            y = y + base.bias
        return y.view(*x.shape[:-1], -1).to(x.dtype)

    def _plain(self, name: str | None, args: Any, kwargs: Any) -> bool:
        if self.disable_adapters or self.merged or name not in self.lora_A or len(self.active_adapters) != 1:
            return False
        return (
            not args
            and not kwargs
            and (isinstance(self.lora_dropout[name], torch.nn.Identity) or not self.training)
            and not self.get_base_layer().weight.requires_grad
            and not torch.is_autocast_enabled(x_device(self))
        )


def register(config: Any) -> None:
    """Have peft put `FusedDora` on each `torch.nn.Linear` that `config` (a LoraConfig with `use_dora`) adapts."""
    config._register_custom_module({torch.nn.Linear: FusedDora})
