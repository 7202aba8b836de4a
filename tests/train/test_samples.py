"""Answers before and after: the same ones as transformers gives, and nothing in training is touched by them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgetune.data.render import Encoded
from edgetune.models import load_model, load_tokenizer
from edgetune.train.samples import Prompt, answers, as_text, beginning, compare, ending, pick


def chat_row(prompt: int, answer: int, start: int = 5) -> Encoded:
    """A row whose tokens count up from `start`."""
    return Encoded(list(range(start, start + prompt + answer)), [False] * prompt + [True] * answer)


@pytest.fixture
def model(tiny_model: Path) -> Any:
    return load_model(tiny_model, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(tiny_model)


def test_a_prompt_ends_where_learning_begins() -> None:
    row = Encoded([5, 6, 7, 8, 9, 10, 11, 12], [False, False, False, True, True, False, False, True])
    assert pick([row], 3) == [Prompt([5, 6, 7], [8, 9])]


def test_picked_prompts_are_spread_different_and_always_the_same() -> None:
    rows = [chat_row(4, 3, start) for start in range(5, 95)]
    found = pick(rows, 3)
    assert found == pick(list(rows), 3)
    assert [prompt.ids[0] for prompt in found] == [20, 50, 80]
    assert len(pick([rows[0]] * 10 + [rows[1]], 3)) == 2
    assert pick(rows, 0) == [] and pick([], 3) == []
    assert pick([Encoded([5, 6], [False, False])], 1) == []


def test_short_prompts_go_first_and_long_ones_only_where_they_must() -> None:
    rows = [chat_row(length, 3, length) for length in (300, 20, 900, 30, 400, 25)]
    assert [len(prompt.ids) for prompt in pick(rows, 3)] == [20, 30, 25]
    assert [len(prompt.ids) for prompt in pick(rows, 4)] == [300, 20, 30, 25]
    assert len(pick(rows, 9)) == 6


def test_plain_text_is_given_in_part() -> None:
    (found,) = pick([Encoded(list(range(5, 25)), [False] + [True] * 19)], 1)
    assert found == Prompt(list(range(5, 15)), list(range(15, 25)))
    (long,) = pick([Encoded([7] * 500, [False] + [True] * 499)], 1)
    assert len(long.ids) == 32


PROMPTS = [Prompt([5, 6, 7, 8], [9]), Prompt([200, 30, 31, 77, 12, 9], [9]), Prompt([50], [9])]


def expected(model: Any, tokenizer: Any, prompt: Prompt, count: int, stops: list[int]) -> str:
    found = model.generate(
        torch.tensor([prompt.ids]),
        do_sample=False,
        max_new_tokens=count,
        eos_token_id=stops,
        pad_token_id=0,
        attention_mask=torch.ones(1, len(prompt.ids), dtype=torch.long),
    )
    ids = [token for token in found[0, len(prompt.ids) :].tolist() if token not in stops]
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_answers_are_those_of_transformers_own_greedy_search(model: Any, tokenizer: Any) -> None:
    for stops in ([2], [2, *range(100, 200)]):
        told = answers(model, tokenizer, PROMPTS, 12, stops)
        assert told == [expected(model, tokenizer, prompt, 12, stops) for prompt in PROMPTS]
    assert len({*answers(model, tokenizer, PROMPTS, 12, [2])}) > 1, (
        "the model answers all alike: the test shows nothing"
    )


def test_answers_of_an_adapter_are_those_of_its_merged_model(model: Any, tokenizer: Any) -> None:
    from peft import LoraConfig, get_peft_model

    plain = answers(model, tokenizer, PROMPTS, 8, [2])
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    told = answers(adapted, tokenizer, PROMPTS, 8, [2])
    assert told != plain
    assert told == answers(adapted.merge_and_unload(), tokenizer, PROMPTS, 8, [2])


@pytest.mark.parametrize("training", [True, False])
def test_training_is_left_as_it_was(model: Any, tokenizer: Any, training: bool) -> None:
    """Mode, gradients and all random generators; with dropout, checkpointing and a gradient step before and after."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5))
    adapted.gradient_checkpointing_enable()
    adapted.enable_input_require_grads()
    adapted.train(training)

    def loss() -> torch.Tensor:
        return adapted(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss

    loss().backward()
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    grads = {name: value.grad.clone() for name, value in adapted.named_parameters() if value.grad is not None}
    first = answers(adapted, tokenizer, PROMPTS, 6, [2])
    assert adapted.training is training and all(module.training is training for module in adapted.modules())
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert states[2] == np.random.get_state()[1].tolist()
    assert grads and all(
        torch.equal(value, dict(adapted.named_parameters())[name].grad) for name, value in grads.items()
    )
    loss().backward()
    assert answers(adapted, tokenizer, PROMPTS, 6, [2]) == first


def test_the_mode_is_restored_after_an_error(model: Any, tokenizer: Any) -> None:
    model.train()
    with pytest.raises(IndexError):
        answers(model, tokenizer, [Prompt([10_000], [])], 4, [2])
    assert model.training


def test_the_context_is_not_overrun(model: Any, tokenizer: Any) -> None:
    long = Prompt([5 + at % 300 for at in range(510)], [9])
    asked: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    answers(model, tokenizer, [long], 48, [])
    assert asked == [510, 1], "512 tokens are the model's context"


def test_a_model_without_a_cache(model: Any, tokenizer: Any) -> None:
    class NoCache(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.config = model, model.config

        def forward(self, input_ids: Any, past_key_values: Any, use_cache: bool, logits_to_keep: int) -> Any:
            out = self.inner(input_ids=input_ids, use_cache=False, logits_to_keep=logits_to_keep)
            out.past_key_values = None
            return out

    assert answers(NoCache(), tokenizer, PROMPTS, 8, [2]) == answers(model, tokenizer, PROMPTS, 8, [2])


def test_all_processes_run_the_same_number_of_passes(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where weights are divided, a process that stops early would leave the others waiting."""
    everything = list(range(384))
    passes: list[int] = []
    model.register_forward_hook(lambda *args: passes.append(1))
    assert answers(model, tokenizer, PROMPTS[:1], 5, everything) == [""] and len(passes) == 1
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert answers(model, tokenizer, PROMPTS[:1], 5, everything) == [""] and len(passes) == 6


def test_report_and_text(tokenizer: Any) -> None:
    asked = tokenizer("<|im_start|>user\nOne plus one?<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)
    prompt = Prompt(asked["input_ids"], [*tokenizer("Two.", add_special_tokens=False)["input_ids"], 2])
    (sample,) = compare(tokenizer, [prompt], ["Thr\nee"], [""], [2])
    assert sample["prompt"].startswith("<|im_start|>user\nOne plus one?") and sample["reference"] == "Two."
    shown = as_text([sample])
    assert shown.splitlines()[1:] == ["   - reference: Two.", "   - before: Thr ee", "   - after: (nothing)"]
    assert beginning("abc def ghi", 6) == "abc d…" and ending("abc def ghi", 6) == "…f ghi"
