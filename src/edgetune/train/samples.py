"""Answers to fixed prompts before and after training, so that a person sees what a loss does not say.

The prompts are validation rows up to their first learned token; what follows there is the reference. Decoding is greedy,
so that equal weights give equal answers and no random generator is touched: a resumed training stays exact.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from edgetune.data.render import Encoded

_LOOKED_AT = 1024  # validation rows, so that a file of any size is quick to pick from
_SHORT = 256  # tokens of a prompt that costs little to read on a CPU
_BEGINNING = 32  # tokens at most of a row of plain text that are given, to be continued


@dataclass(frozen=True)
class Prompt:
    """What is asked, and what the data answers: token ids of both."""

    ids: list[int]
    reference: list[int]


def pick(rows: Sequence[Encoded], count: int) -> list[Prompt]:
    """Choose prompts: spread evenly over the rows, all different, none over 256 tokens where that can be had.

    A pure function of the rows: the same ones before, after, and in the next training on this data.

    Args:
        rows: validation rows; the first 1,024 are looked at.
        count: how many; fewer come back where there are fewer different prompts.
    """
    different: dict[tuple[int, ...], Prompt] = {}
    for at in range(min(len(rows), _LOOKED_AT)):
        if prompt := prompt_of(rows[at]):
            different.setdefault(tuple(prompt.ids), prompt)
    found = list(different.values())
    short = [prompt for prompt in found if len(prompt.ids) <= _SHORT]
    if len(short) < count:  # take the shortest, in the order of the rows
        allowed = sorted(len(prompt.ids) for prompt in found)[:count]
        short = [prompt for prompt in found if allowed and len(prompt.ids) <= allowed[-1]]
    if len(short) <= count:
        return short
    return [short[(2 * at + 1) * len(short) // (2 * count)] for at in range(count)]


def prompt_of(row: Encoded) -> Prompt | None:
    """What a row asks and answers first; None where it has nothing to learn."""
    learned = list(row.learned)
    if True not in learned:
        return None
    start = learned.index(True)
    if start <= 1:  # plain text, learned from its beginning: half of it is given, to be continued
        start = min(_BEGINNING, len(row.ids) // 2)
    end = next((at for at in range(start, len(learned)) if not learned[at]), len(learned))
    return Prompt(list(row.ids[:start]), list(row.ids[start:end])) if start else None


def answers(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], max_new_tokens: int, stop_ids: Collection[int]
) -> list[str]:
    """Greedy answers, in evaluation mode.

    Each step is a plain forward pass with a key-value cache, one prompt at a time, so that a model inside DDP, DeepSpeed or
    FSDP can be asked too: then on every process at once, with the same prompts; all run the same number of passes.

    Args:
        model: a causal language model, peft's or wrapped by an engine; its training mode is restored afterwards.
        tokenizer: the one that the prompts were encoded with.
        prompts: from `pick`.
        max_new_tokens: of each answer at most; fewer where the model's context ends.
        stop_ids: tokens that end an answer.

    Returns:
        The texts, without special tokens.
    """
    import torch

    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    stops, was_training = frozenset(stop_ids), model.training
    model.eval()
    try:
        with torch.no_grad():  # not inference_mode: weights that an engine gathers in it cannot be trained afterwards
            found = [
                _greedy(model, prompt.ids, max_new_tokens, frozenset() if together else stops) for prompt in prompts
            ]
    finally:
        model.train(was_training)
    return [_text(tokenizer, ids, stops) for ids in found]


def _greedy(model: Any, prompt: Sequence[int], count: int, stops: Collection[int]) -> list[int]:
    import torch

    from edgetune.train import shards

    device = shards.device(model)
    context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(context, int):
        count = min(count, context - len(prompt))
    answer: list[int] = []
    given, past = list(prompt), None
    while len(answer) < count:
        inputs = torch.tensor([given], device=device)
        out = model(input_ids=inputs, past_key_values=past, use_cache=True, logits_to_keep=1)
        answer.append(int(out.logits[0, -1].argmax()))
        if answer[-1] in stops:
            break
        past = getattr(out, "past_key_values", None)
        given = answer[-1:] if past is not None else [*prompt, *answer]  # a model without a cache reads all again
    return answer


def _text(tokenizer: Any, ids: Sequence[int], stops: Collection[int]) -> str:
    """The words up to the first stop token."""
    end = next((at for at, token in enumerate(ids) if token in stops), len(ids))
    return tokenizer.decode(list(ids[:end]), skip_special_tokens=True).strip()


def compare(
    tokenizer: Any, prompts: Sequence[Prompt], before: Sequence[str], after: Sequence[str], stop_ids: Collection[int]
) -> list[dict[str, str]]:
    """What goes into the report: for each prompt `prompt` (with its special tokens, as the model reads it), `reference`
    (the data's answer), `before` and `after`."""
    return [
        {
            "prompt": tokenizer.decode(prompt.ids),
            "reference": _text(tokenizer, prompt.reference, stop_ids),
            "before": first,
            "after": last,
        }
        for prompt, first, last in zip(prompts, before, after, strict=True)
    ]


def as_text(samples: Sequence[dict[str, str]], width: int = 400) -> str:
    """Samples as plain text that is Markdown too.

    Args:
        samples: from `compare`.
        width: characters of each text at most: the end of a prompt, the beginning of an answer.
    """
    lines = []
    for number, sample in enumerate(samples, 1):
        lines.append(f"{number}. prompt: {ending(sample['prompt'], width)}")
        lines += [f"   - {name}: {beginning(sample[name], width)}" for name in ("reference", "before", "after")]
    return "\n".join(lines)


def beginning(text: str, width: int) -> str:
    """The text on one line, cut at the end."""
    line = " ".join(text.split()) or "(nothing)"
    return line if len(line) <= width else f"{line[: width - 1].rstrip()}…"


def ending(text: str, width: int) -> str:
    """The text on one line, cut at its beginning: in a prompt, what was asked stands last."""
    line = " ".join(text.split())
    return line if len(line) <= width else f"…{line[1 - width :].lstrip()}"
