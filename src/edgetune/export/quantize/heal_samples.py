"""Rows that the merged model writes itself, to heal on beside the user's: its own words are where its distributions count.

Each begins as a training row does, and is drawn from the model token by token, at temperature 1. See Liu et al., "LLM-QAT:
Data-Free Quantization Aware Training for Large Language Models", arXiv 2305.17888.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from edgetune import progress
from edgetune.data.batch import Encoded
from edgetune.train.samples import prompt_of

_TOGETHER = 32  # rows that are drawn at once, of prompts of like length
_LONGEST = 160  # tokens of an answer


def own_rows(model: Any, rows: Sequence[Encoded], count: int, stop_ids: Collection[int], seed: int) -> list[Encoded]:
    """Let the model answer the prompts of `rows`; a row of plain text gives its first 32 tokens.

    Args:
        model: a causal language model in evaluation mode.
        rows: training rows; where there are fewer than `count`, prompts are used again.
        count: how many rows to write.
        stop_ids: tokens that end an answer; they are part of it.
        seed: of the draws.

    Returns:
        The rows, what the model wrote marked as learned.
    """
    prompts = [prompt.ids for row in rows if (prompt := prompt_of(row)) is not None]
    wanted = sorted((prompts[i % len(prompts)] for i in range(count)), key=len) if prompts else []
    draw = torch.Generator(model.device).manual_seed(seed)
    found: list[Encoded] = []
    with progress.task("own samples", len(wanted)) as bar, torch.no_grad():
        for start in range(0, len(wanted), _TOGETHER):
            some = wanted[start : start + _TOGETHER]
            for begun, answer in zip(some, _answers(model, some, frozenset(stop_ids), draw), strict=True):
                learned = [False] * len(begun) + [True] * len(answer)
                found.append(Encoded([*begun, *answer], learned))
            bar.advance(len(some))
    return found


def _answers(
    model: Any, prompts: Sequence[Sequence[int]], stops: frozenset[int], draw: torch.Generator
) -> list[list[int]]:
    """What the model goes on with, up to and with a stop token."""
    width, device = max(map(len, prompts)), model.device
    ids = torch.tensor([[0] * (width - len(one)) + list(one) for one in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts], device=device)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or width + _LONGEST
    answers: list[list[int]] = [[] for _ in prompts]
    running, past = set(range(len(prompts))), None
    for _ in range(min(_LONGEST, context - width)):
        places = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": places, "past_key_values": past}
        out = model(**given, use_cache=True, logits_to_keep=1)
        past = out.past_key_values
        drawn = torch.multinomial(out.logits[:, -1].float().softmax(-1), 1, generator=draw)
        for i in list(running):
            answers[i].append(int(drawn[i]))
            if answers[i][-1] in stops:
                running.remove(i)
        if not running:
            break
        ids, mask = drawn, torch.cat([mask, mask.new_ones(len(prompts), 1)], 1)
    return answers
