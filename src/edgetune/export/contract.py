"""The chat contract: what the model saw in training is what the runtime sends.

`golden.json` carries conversations with the text and the token ids that the trained model's own tokenizer and
template give for them; the runtime compares its own against these whenever it loads the artifact.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from edgetune.errors import InputError
from edgetune.files import write_json
from edgetune.models import load_tokenizer
from edgetune.runtime.artifact import GOLDEN_FORMAT

# Conversations without a user's data: ordinary words, a system turn, several turns, and text that is hard to tokenize.
CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "You answer in one short sentence."},
        {"role": "user", "content": "Why is the sky blue?"},
    ],
    [
        {"role": "user", "content": "Name a color."},
        {"role": "assistant", "content": "Blue."},
        {"role": "user", "content": "Another one, please."},
    ],
    [
        {
            "role": "user",
            "content": "  Two  spaces,\ttabs,\n\nlines: naïve café, Straße, 東京, Привет, 👋🏽, 3.14159, x_i += 1;",
        }
    ],
]


def write_contract(
    merged: Path, artifact: Path, stop_ids: list[int], name: str, *, trust_remote_code: bool = False
) -> None:
    """Write `golden.json` and `inference_model.json` (the layout that local model catalogs read) into an artifact.

    Args:
        merged: transformers folder that the artifact was made from.
        artifact: folder to write to; its chat_template.jinja is made equal to the merged model's.
        stop_ids: token ids that end an answer.
        name: the artifact's name.
        trust_remote_code: run code that the merged model's folder brings.

    Raises:
        InputError: the model has no chat template.
    """
    tokenizer = load_tokenizer(merged, trust_remote_code=trust_remote_code)
    if not tokenizer.chat_template:
        raise InputError(
            "the model has no chat template, which every artifact needs",
            where=merged,
            fix="put one into the model's folder, as chat_template.jinja",
        )
    (artifact / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    prompts = [found for conversation in CONVERSATIONS if (found := _golden(tokenizer, conversation))]
    write_json(
        artifact / "golden.json",
        {
            "format": GOLDEN_FORMAT,
            "chat_template_sha256": hashlib.sha256(tokenizer.chat_template.encode()).hexdigest(),
            "stop_ids": stop_ids,
            "prompts": prompts,
        },
    )
    write_json(artifact / "inference_model.json", {"Name": name, "PromptTemplate": _prompt_template(tokenizer)})


def _golden(tokenizer: Any, messages: list[dict[str, str]]) -> dict[str, Any] | None:
    text = _text(tokenizer, messages, answer=True)
    if text is None:  # a template may refuse a system turn; the runtime refuses it likewise
        return None
    return {"messages": messages, "text": text, "ids": tokenizer(text, add_special_tokens=False)["input_ids"]}


def _prompt_template(tokenizer: Any) -> dict[str, str]:
    """The template in the words of local catalogs: text around `{Content}`, as far as the template has such turns.

    `prompt` is a first question up to where the answer begins, with what the template puts in front; `system`, `user` and
    `assistant` are whole turns. Foundry Local takes folders with this file and a `Name` in it for models:
    https://learn.microsoft.com/azure/foundry-local/how-to/how-to-compile-hugging-face-models
    """
    mark = "{Content}"
    system, user, assistant = ({"role": role, "content": mark} for role in ("system", "user", "assistant"))
    found = {"prompt": _text(tokenizer, [user], answer=True) or ""}
    for role, before, turns in (
        ("system", [], [system]),
        ("user", [system], [system, user]),
        ("assistant", [user], [user, assistant]),
    ):
        whole, start = _text(tokenizer, turns), _text(tokenizer, before) if before else ""
        if whole is None or start is None:
            continue  # no such turn
        turn = whole[len(start) :]
        if whole.startswith(start) and turn.count(mark) == 1:
            found[role] = turn
    return found


def _text(tokenizer: Any, messages: list[dict[str, str]], answer: bool = False) -> str | None:
    """What the template makes of a conversation, None where it refuses it."""
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer))
    except TemplateError:
        return None
