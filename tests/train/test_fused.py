"""Norm and gate against transformers' own, values and gradients."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from edgetune.train.fused import FusedMLP, FusedRMSNorm, install


def pair(dtype: torch.dtype) -> tuple[torch.nn.Module, torch.nn.Module]:
    made = []
    for _ in range(2):
        norm = LlamaRMSNorm(32, eps=1e-3).to(dtype)
        norm.weight.data.copy_(torch.linspace(0.5, 2, 32))
        made.append(norm)
    assert install(torch.nn.ModuleList([made[1]])) == 1
    assert type(made[1]) is FusedRMSNorm
    return made[0], made[1]


@pytest.mark.parametrize("trains", [False, True])
def test_values_and_gradients(trains: bool) -> None:
    theirs, ours = pair(torch.float32)
    x = torch.randn(3, 5, 32)
    upstream = torch.randn(3, 5, 32)
    found = []
    for norm in (theirs, ours):
        norm.weight.requires_grad_(trains)
        one = x.clone().requires_grad_()
        out = norm(one)
        out.backward(upstream)
        found.append((out.detach(), one.grad, norm.weight.grad))
    for mine, other in zip(*found, strict=True):
        if mine is None or other is None:
            assert mine is other is None and not trains
        else:
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_bfloat16_gives_the_same_bits_forward() -> None:
    theirs, ours = pair(torch.bfloat16)
    x = torch.randn(40, 32).bfloat16()
    assert (theirs(x) == ours(x)).float().mean() > 0.99  # the sum of squares may round another way
    torch.testing.assert_close(theirs(x), ours(x), rtol=1e-2, atol=1e-2)


def test_another_formula_stays_as_it_is() -> None:
    norm = GemmaRMSNorm(32)  # multiplies by 1 + w
    assert install(torch.nn.ModuleList([norm])) == 0
    assert type(norm) is GemmaRMSNorm


def test_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=48)
    theirs, ours = LlamaMLP(config), LlamaMLP(config)
    ours.load_state_dict(theirs.state_dict())
    assert install(torch.nn.ModuleList([ours])) == 1 and type(ours) is FusedMLP and ours.training
    x, upstream = torch.randn(3, 5, 32), torch.randn(3, 5, 32)
    found = []
    for layer in (theirs, ours):
        one = x.clone().requires_grad_()
        out = layer(one)
        out.backward(upstream)
        found.append([out.detach(), one.grad, *(p.grad for p in layer.parameters())])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_another_activation_stays_as_it_is() -> None:
    layer = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=48, hidden_act="gelu"))
    assert install(torch.nn.ModuleList([layer])) == 0 and type(layer) is LlamaMLP
