"""What the model is given: drawn prompts of an exact length, conversations, texts to copy, and your own from a file.

Everything is drawn from the round's name: the same at every call, and no two rounds alike from the first words on, so
that no cache of prefixes flatters.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgetune.errors import InputError

_WORDS = """
a about after again air all also an and animal answer around as ask at away back be because before below
best better big bird black blue boat book both bread bring build but by call can carry change child city
clean clear close cold come cook corner count country cut day deep did do door down draw drive dry each
early earth east eat end even every eye far fast father feel few field find fire first fish five follow food
for forest four friend from full game garden give glass go gold good grass great green ground grow half hand
happy hard have hear heavy help here high hill hold home horse hot house how hundred idea if in island it
just keep kind king know land large last late laugh learn leave left letter light line listen little long
look machine make many map mark may mean milk minute moon more morning most mother mountain move much music
must name near need never new next night north now number of off often old on once one only open or order
other our out over page paper part pass people picture piece place plan plant play point put question quick
rain reach read ready red rest river road rock room round run salt same say school sea second see seed seven
ship short show side sing six sky sleep slow small snow some song soon sound south space spring stand star
start stay step still stone stop storm story street strong summer sun sure table take talk tell ten than
that the then these they thing think this those three through time to today together too town train travel
tree true try turn two under until up use very voice wait walk wall want warm watch water way weather week
well west what wheel when where which white who why wide will wind window winter with without woman wood
word work world write year yellow yes yet you young
"""
_TRIES = 1000
_FEWEST = 8  # tokens from which on prompts must differ: shorter ones leave a cache nothing to keep
_MOST_BYTES = 64 << 20
Conversation = list[dict[str, str]]


def distinct_prompts(
    encode: Callable[[str], Any], tokens: int, warmup: int, repetitions: int
) -> list[tuple[str, list[int]]]:
    """Prompts of exactly `tokens` ids with the text that they were cut from, warm-ups first, the same at every call.

    They are drawn words, cut to length. How many warm-ups there are does not change the prompts that count.

    Raises:
        InputError: there are not enough different ones (of prompts under 8 tokens, equal ones are taken).
    """
    found: list[tuple[str, list[int]]] = []
    seen: set[tuple[int, ...]] = set()
    words = _WORDS.split()
    for name in round_names(warmup, repetitions):
        draw = random.Random(name)
        for _ in range(_TRIES):
            ids: list[int] = []
            text = draw.choices(words, k=tokens)
            while len(ids) < tokens:  # a tokenizer may make one token of two words
                text += draw.choices(words, k=16)
                ids = [int(token) for token in encode(" ".join(text))]
            if tokens < _FEWEST or tuple(ids[:tokens]) not in seen:
                seen.add(tuple(ids[:tokens]))
                found.append((" ".join(text), ids[:tokens]))
                break
        else:
            raise InputError(
                f"there are not {warmup + repetitions} different prompts of {tokens} tokens",
                where="prompt_tokens",
                fix="take longer prompts or fewer rounds",
            )
    return found


def round_names(warmup: int, repetitions: int) -> list[str]:
    """What each round's prompt is drawn by, warm-ups first."""
    return [*(f"warm-up {n}" for n in range(warmup)), *(f"round {n}" for n in range(repetitions))]


def words_prompt(name: str, words: int) -> str:
    """Drawn words, for a service whose tokenizer is not known here."""
    return " ".join(random.Random(name).choices(_WORDS.split(), k=words))


def talks(kind: str, name: str, own: Sequence[Conversation | str] | None = None) -> list[list[Conversation | str]]:
    """What is asked in one round of a workload: conversations, each a list of turns.

    A turn is what is said behind the answer before it, or a text that is sent as it is.

    Args:
        kind: of `workloads.Workload`: chat, copy or file.
        name: what the round is drawn by.
        own: prompts of a file, each of which is asked.
    """
    if kind == "chat":
        return [[[{"role": "user", "content": text}] for text in conversation(name)]]
    if kind == "copy":
        return [[copying(name)]]
    return [[prompt] for prompt in own or ()]


def conversation(name: str) -> list[str]:
    """What a person says in four turns; the answers between are the model's own."""
    draw = random.Random(f"chat {name}")
    who, what, where = (draw.choice(_WORDS.split()) for _ in range(3))
    hour, people = draw.randint(6, 11), draw.randint(3, 90)
    return [
        f"The {who} {what} is the name of my small shop by the {where}; about {people} people come in a day. "
        "Give me three ideas to bring in more of them this season.",
        "Take the second of them. What would I need for it, and what would go wrong first?",
        "Write a notice of it for the window, in no more than forty words.",
        f"Now say it in a friendlier way, and add that we open at {hour} in the morning.",
    ]


def copying(name: str) -> Conversation:
    """One turn whose good answer quotes most of it: the order book of a shop, to be written out again."""
    draw = random.Random(f"copy {name}")
    words = _WORDS.split()
    orders = [
        f"{n}. {draw.choice(words)} {draw.choice(words)}, {draw.randint(2, 900)} pieces at {draw.randint(1, 99)}."
        f"{draw.randint(10, 99)} each, for the {draw.choice(words)} {draw.choice(words)} in {draw.choice(words)} street"
        for n in range(1, 9)
    ]
    ask = f"These are the orders of the {draw.choice(words)} {draw.choice(words)}:"
    listed = "\n".join(orders)
    return [{"role": "user", "content": f"{ask}\n\n{listed}\n\nWrite the list again, word for word."}]


def quoted(prompt: Sequence[Any], answer: Sequence[Any], size: int = 4) -> float | None:
    """The share of the answer's runs of `size` tokens (or words) that stand in the prompt; None where it has none."""
    runs = [tuple(answer[i : i + size]) for i in range(len(answer) - size + 1)]
    there = {tuple(prompt[i : i + size]) for i in range(len(prompt) - size + 1)}
    return sum(run in there for run in runs) / len(runs) if runs else None


def read_prompts(file: Path) -> list[Conversation | str]:
    """Prompts from a file.

    `.jsonl`: a row each, with `messages` (an answer at the end is left off: rows of training data will do), or with
    `prompt` or `text`, sent as it is. Any other file is one prompt.

    Raises:
        InputError: no such file, not UTF-8, empty, or a row that is neither; `where` is file:line.
    """
    if not file.is_file():
        raise InputError("is a folder" if file.is_dir() else "no such file", where=file, fix="give a file of prompts")
    if file.stat().st_size > _MOST_BYTES:
        raise InputError(f"has more than {_MOST_BYTES >> 20} MiB", where=file, fix="give fewer prompts")
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 text (byte {error.start})", where=file, fix="give text in UTF-8") from error
    if file.suffix != ".jsonl":
        found: list[Conversation | str] = [text] if text.strip() else []
    else:
        lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        found = [_row(line, f"{file}:{n}") for n, line in lines]
    if not found:
        raise InputError("holds no prompt", where=file, fix="give a row or a text")
    return found


def _row(line: str, where: str) -> Conversation | str:
    fix = 'such as {"messages": [{"role": "user", "content": "…"}]} or {"prompt": "…"}'
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"is not JSON: {error}", where=where, fix=fix) from error
    if not isinstance(row, dict):
        raise InputError("is not a JSON object", where=where, fix=fix)
    if "messages" not in row:
        text = row.get("prompt", row.get("text"))
        if not isinstance(text, str) or not text.strip():
            raise InputError("has neither messages nor a prompt", where=where, fix=fix)
        return text
    messages = row["messages"]
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    ):
        raise InputError("messages must be a list of role and content, both strings", where=where, fix=fix)
    kept = [{"role": message["role"], "content": message["content"]} for message in messages]
    while kept and kept[-1]["role"] == "assistant":
        kept.pop()
    if not kept:
        raise InputError("has no turn that asks for an answer", where=where, fix=fix)
    return kept
