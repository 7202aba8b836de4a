"""The LoRA layer: peft's own, with the forward and backward pass of its products written out.

peft computes `W·x + s·B(A·x)` by casting x to float32 and leaving the rest to autograd: on a processor that is fast in
bfloat16 the thin float32 products and the casts cost as much as the base's. Here all products run in the base's dtype,
while A and B and their gradients stay float32, and what the backward pass needs is kept once: x and A·x.
Saved and merged, it is peft's adapter.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear


class _Product(torch.autograd.Function):
    """y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ (+ bias), with W frozen. arXiv 2106.09685, equation 3.

    A·x first: rank x (in + out) products a token, against in x out for B·A first.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        a, b = a.to(x.dtype), (b * scale).to(x.dtype)
        hidden = x @ a.t()
        y = torch.nn.functional.linear(x, weight, bias)
        y.addmm_(hidden, b.t())
        ctx.save_for_backward(x, weight, a, b, hidden)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, weight, a, b, hidden = ctx.saved_tensors
        dy = grads[0]
        dhidden = dy @ b
        dx = None
        if ctx.needs_input_grad[0]:  # not so in the first adapted layer: nothing before it learns
            dx = dy @ weight
            dx.addmm_(dhidden, a)
        return dx, None, None, (dhidden.t() @ x).float(), (dy.t() @ hidden).float().mul_(ctx.scale), None


class FusedLinear(Linear):
    """peft's LoRA layer on a frozen `torch.nn.Linear`; whatever `_Product` does not cover is left to peft."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As peft's: x (…, in) in the base's dtype to (…, out)."""
        name = self.active_adapters[0] if self.active_adapters else None
        if not self._plain(name, args, kwargs):
            return super().forward(x, *args, **kwargs)
        base, a, b = self.get_base_layer(), self.lora_A[name].weight, self.lora_B[name].weight
        x2 = x.reshape(-1, x.shape[-1]).to(base.weight.dtype)
        y = _Product.apply(x2, base.weight, base.bias, a, b, self.scaling[name])
        return y.view(*x.shape[:-1], -1).to(x.dtype)

    def _plain(self, name: str | None, args: Any, kwargs: Any) -> bool:
        if self.disable_adapters or self.merged or name not in self.lora_A or len(self.active_adapters) != 1:
            return False
        dropout = self.lora_dropout[name]
        return (
            not args
            and not kwargs
            and name not in self.lora_variant  # DoRA and others
            and (isinstance(dropout, torch.nn.Identity) or not self.training)
            and self.lora_B[name].bias is None
            and not self.get_base_layer().weight.requires_grad
            and not torch.is_autocast_enabled(x_device(self))
        )


def x_device(layer: Any) -> str:
    """Kind of the device that a layer's weights lie on."""
    return str(layer.get_base_layer().weight.device.type)


def register(config: Any) -> None:
    """Have peft put `FusedLinear` on each `torch.nn.Linear` that `config` (a LoraConfig) adapts."""
    config._register_custom_module({torch.nn.Linear: FusedLinear})
