"""The LoRA layer on a 4-bit base: as in `lora.py`, with the base's weight dequantized for each product and not kept."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit as Base4bit
from peft.tuners.lora.bnb import Linear4bit

from edgetune.train.lora import FusedLinear
from edgetune.train.quantize import dequantized


class _Product4bit(torch.autograd.Function):
    """y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ (+ bias), W being the frozen 4-bit layer's. Between the passes W exists in 4 bits only."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Any, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
        a, b = a.to(x.dtype), (b * scale).to(x.dtype)
        hidden = x @ a.t()
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        y = torch.nn.functional.linear(x, dequantized(layer).to(x.dtype), bias)
        y.addmm_(hidden, b.t())
        ctx.save_for_backward(x, a, b, hidden)
        ctx.layer, ctx.scale = layer, scale
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, a, b, hidden = ctx.saved_tensors
        dy = grads[0]
        dhidden = dy @ b
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ dequantized(ctx.layer).to(dy.dtype)
            dx.addmm_(dhidden, a)
        return dx, None, (dhidden.t() @ x).float(), (dy.t() @ hidden).float().mul_(ctx.scale), None


class FusedLinear4bit(Linear4bit):
    """peft's LoRA layer on bitsandbytes' 4-bit layer; whatever `_Product4bit` does not cover is left to peft."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As peft's: x (…, in) in the base's dtype to (…, out)."""
        name = self.active_adapters[0] if self.active_adapters else None
        if not self._plain(name, args, kwargs):
            return super().forward(x, *args, **kwargs)
        base, a, b = self.get_base_layer(), self.lora_A[name].weight, self.lora_B[name].weight
        x2 = x.reshape(-1, x.shape[-1]).to(base.compute_dtype)
        y = _Product4bit.apply(x2, base, a, b, self.scaling[name])
        return y.view(*x.shape[:-1], -1).to(x.dtype)

    _plain = FusedLinear._plain


def register(config: Any) -> None:
    """Have peft put `FusedLinear4bit` on each 4-bit layer that `config` (a LoraConfig) adapts."""
    config._register_custom_module({Base4bit: FusedLinear4bit})
