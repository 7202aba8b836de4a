"""Passes and losses: packed equals padded equals plain, values and gradients, and what does not fit is given up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from edgetune.data.render import Encoded
from edgetune.models import load_model
from edgetune.train import attention, lora
from edgetune.train.objective import Objective


def rows(*lengths: int) -> list[Encoded]:
    draw = torch.Generator().manual_seed(3)
    found = []
    for length in lengths:
        ids = torch.randint(3, 380, (length,), generator=draw).tolist()
        found.append(Encoded(ids, [n % 3 > 0 for n in range(length)]))
    return found


def adapted(path: Path, fused: bool, dtype: Any = torch.float32, **options: Any) -> Any:
    """The tiny model with an adapter whose B is not zero, the same one each time."""
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", **options)
    if fused:
        lora.register(config)
    torch.manual_seed(0)
    model = get_peft_model(load_model(path, dtype=dtype), config)
    draw = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
    return model.train()


def plain_loss(model: Any, some: list[Encoded]) -> torch.Tensor:
    """transformers and peft as they come, one row at a time."""
    total = torch.zeros(())
    for row in some:
        logits = model(input_ids=torch.tensor([row.ids])).logits[0, :-1]
        learned = torch.tensor(row.learned[1:], dtype=torch.bool)
        targets = torch.tensor(row.ids[1:], dtype=torch.long)
        total = total + torch.nn.functional.cross_entropy(logits[learned].float(), targets[learned], reduction="sum")
    return total


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_loss_and_gradients_equal_peft_and_transformers(
    tiny_model: Path, packed: bool, options: dict[str, Any]
) -> None:
    some = rows(9, 40, 1, 17, 150)
    reference = adapted(tiny_model, False, **options)
    wanted = plain_loss(reference, some)
    wanted.backward()
    model = adapted(tiny_model, True, **options)
    assert attention.use(model)
    objective = Objective(model, 0, packed)
    assert objective.head is not None
    assert objective.prove(model, some) == []
    total = 0.0
    for part in (some[:2], some[2:]):  # two passes of one step
        loss = objective.loss(model, objective.batch(part))
        loss.backward()
        total += float(loss)
    assert total == pytest.approx(float(wanted), rel=1e-5)
    ours, theirs = gradients(model), gradients(reference)
    assert ours.keys() == theirs.keys() and len(ours) >= 28
    for name, gradient in theirs.items():
        assert float((ours[name] - gradient).norm()) < 1e-4 * float(gradient.norm()) + 1e-6, name


def test_the_fused_layer_is_used_and_its_backward_stops_at_the_first_layer(tiny_model: Path) -> None:
    model = adapted(tiny_model, True)
    fused = [m for m in model.modules() if isinstance(m, lora.FusedLinear)]
    assert len(fused) == 14
    x = torch.randn(3, fused[0].in_features)
    out = fused[0](x)
    assert type(out.grad_fn.next_functions[0][0]).__name__ == "_ProductBackward" or "Product" in str(out.grad_fn)


def test_dropout_goes_peft_s_way(tiny_model: Path) -> None:
    model = adapted(tiny_model, True, lora_dropout=0.5)
    layer = next(m for m in model.modules() if isinstance(m, lora.FusedLinear))
    x = torch.randn(64, layer.in_features)
    assert not torch.equal(layer(x), layer(x))
    model.eval()
    torch.testing.assert_close(layer(x), layer(x))


def test_bfloat16_gradients_are_as_near_as_peft_s(tiny_model: Path) -> None:
    some = rows(60, 90)
    exact = adapted(tiny_model, False, torch.bfloat16).float()
    plain_loss(exact, some).backward()
    wanted = torch.cat([g.flatten() for g in gradients(exact).values()])
    errors = []
    for fused in (False, True):
        model = adapted(tiny_model, fused, torch.bfloat16)
        if fused:
            attention.use(model)
            objective = Objective(model, 0, True)
            objective.loss(model, objective.batch(some)).backward()
        else:
            plain_loss(model, some).backward()
        assert all(g.dtype == torch.float32 for g in gradients(model).values())
        found = torch.cat([g.flatten() for g in gradients(model).values()])
        errors.append(float((found - wanted).norm() / wanted.norm()))
    assert errors[1] < 1.5 * errors[0] and errors[1] < 0.1


def test_score_counts_learned_tokens_and_restores_the_mode(tiny_model: Path) -> None:
    model = load_model(tiny_model, dtype=torch.float32).train()
    attention.use(model)
    some = rows(20, 30)
    for packed in (True, False):
        loss, right, count = Objective(model, 0, packed).score(model, some)
        assert model.training
        assert count == sum(sum(row.learned[1:]) for row in some) and 0 <= right <= count
        assert loss == pytest.approx(float(plain_loss(model, some)), rel=1e-5)


def test_what_does_not_fit_the_model_is_given_up(tiny_model: Path) -> None:
    some = rows(30, 40)
    model = load_model(tiny_model, dtype=torch.float32)
    objective = Objective(model, 0, True)  # packed without the attention for it: rows see one another
    said = objective.prove(model, some)
    assert len(said) == 1 and said[0].startswith("packing does not fit this model and is off (the loss differs")
    assert not objective.packed and objective.head is not None
    model = load_model(tiny_model, dtype=torch.float32)
    attention.use(model)
    objective = Objective(model, 0, True)
    plain = model.forward
    model.forward = lambda **inputs: _capped(plain(**inputs), objective)
    said = objective.prove(model, some)
    assert [part.split(" does")[0] for part in said] == ["computing the loss in the head"]
    assert objective.packed and objective.head is None


def _capped(out: Any, objective: Objective) -> Any:
    """A model that bends its logits after the head, as some do."""
    out.logits = torch.tanh(out.logits / 5) * 5
    return out
