"""Optimizers: groups, rates, and states that resume bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgetune.errors import InputError
from edgetune.recipe import TrainSection
from edgetune.train import optimizer, quantize
from edgetune.train.optimizer import default_learning_rate, make_optimizer, parameter_groups


def network() -> Any:
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(96, 80), torch.nn.LayerNorm(80), torch.nn.Linear(80, 3))


def run(model: Any, made: Any, steps: range) -> None:
    for step in steps:
        x = torch.randn(16, 96, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        made.step()
        made.zero_grad()


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "adamw_8bit"])
def test_resumed_is_uninterrupted_bit_for_bit(kind: str) -> None:
    section = TrainSection(optimizer=kind, weight_decay=0.1)
    whole = network()
    first = make_optimizer(whole, section, 1e-2)
    run(whole, first, range(3))
    saved = copy.deepcopy((whole.state_dict(), first.state_dict()))
    run(whole, first, range(3, 6))

    again = network()
    second = make_optimizer(again, section, 1e-2)
    again.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    run(again, second, range(3, 6))
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
        assert not torch.equal(weight, saved[0][name]), name
    states = [value for state in first.state.values() for value in state.values() if torch.is_tensor(value)]
    kinds = {value.dtype for value in states if value.numel() > 1}
    assert kinds == ({torch.float32, torch.uint8} if kind == "adamw_8bit" else {torch.float32})


def test_adamw_is_pytorchs_plain_one() -> None:
    """The fused one against the loop that PyTorch documents."""
    models = [network(), network()]
    made = make_optimizer(models[0], TrainSection(weight_decay=0.1), 1e-2)
    assert made.defaults["fused"]
    plain = torch.optim.AdamW(parameter_groups(models[1], TrainSection(weight_decay=0.1), 1e-2), foreach=False)
    for model, one in zip(models, (made, plain), strict=True):
        run(model, one, range(5))
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_norms_and_biases_do_not_decay() -> None:
    groups = parameter_groups(network(), TrainSection(weight_decay=0.1), 1e-3)
    by_decay = {group["weight_decay"]: [p.ndim for p in group["params"]] for group in groups}
    assert by_decay == {0.1: [2, 2], 0.0: [1, 1, 1, 1]}


def test_lora_plus_lets_b_learn_faster() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        torch.nn.Sequential(torch.nn.Embedding(10, 8), torch.nn.Linear(8, 8)),
        LoraConfig(target_modules=["0", "1"], r=2),
    )
    groups = parameter_groups(model, TrainSection(lora_plus_ratio=16), 1e-3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    fast = [names[id(p)] for group in groups if group["lr"] == pytest.approx(1.6e-2) for p in group["params"]]
    slow = [names[id(p)] for group in groups if group["lr"] == 1e-3 for p in group["params"]]
    assert len(fast) == 1 and ".1.lora_B." in fast[0]
    assert len(slow) == 3 and any("lora_embedding_B" in name for name in slow)
    assert len(names) > 4  # the frozen ones are in no group


def test_8_bits_need_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"edgetune\[qlora\]"):
        make_optimizer(network(), TrainSection(optimizer="adamw_8bit"), 1e-3)


def test_rates_fit_method_and_size() -> None:
    assert default_learning_rate(TrainSection(), 135_000_000) == 2e-4
    assert default_learning_rate(TrainSection(method="qlora"), 65_000_000_000) == 1e-4
    assert default_learning_rate(TrainSection(method="full"), 135_000_000) == 5e-5
    assert default_learning_rate(TrainSection(learning_rate=1e-3, learning_rate_multiplier=0.5), 1) == 5e-4


@given(
    st.sampled_from(["lora", "qlora", "dora", "full"]),
    st.integers(1, 10**12),
    st.integers(1, 10**12),
    st.floats(0.01, 100),
)
def test_larger_models_never_learn_faster(method: str, a: int, b: int, multiplier: float) -> None:
    section = TrainSection(method=method, learning_rate_multiplier=multiplier)
    small, large = (optimizer.default_learning_rate(section, size) for size in sorted((a, b)))
    assert 0 < large <= small
    assert small <= default_learning_rate(TrainSection(learning_rate_multiplier=multiplier), min(a, b))
