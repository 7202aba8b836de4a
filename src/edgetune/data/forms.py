"""The forms that rows come in, and the one form that the rest of edgetune knows.

Chat rows become `{"messages": [{"role", "content"}, …]}`; rows of plain text stay `{"text": …}`.
Two turns of one role in a row are allowed here: some chat templates take them and some refuse, and the row is
rendered with the model's own template later.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgetune.data.problems import Problems, RowProblem, kind, quoted
from edgetune.data.read import Row

# Form → the keys that a row must have, and those that it may have.
_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), ()),
    "prompt-completion": (("prompt", "completion"), ()),
    "alpaca": (("instruction", "output"), ("input",)),
    "sharegpt": (("conversations",), ()),
    "text": (("text",), ()),
}
FORMS = tuple(_KEYS)
ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}
_PLACES = 3  # rows of each form that are named where forms are mixed
_KNOWN = "; ".join(f"{form}: {', '.join(keys)}" for form, (keys, _) in _KEYS.items())


@dataclass
class _Fitting:
    """Rows that fit the same forms."""

    count: int = 0
    first: list[str] = field(default_factory=list)  # where the first three stand


def find_form(rows: Iterable[Row], problems: Problems) -> str | None:
    """Tell the form from all rows, of which none is kept.

    Returns the one form that the rows fit; single rows that lack its keys are named when they are
    normalized. None with the reason added to `problems`: rows of several forms (rows of each are named), rows
    that all fit several forms, or none that fits any.
    """
    known: dict[frozenset[str], _Fitting] = {}
    unknown = Problems()
    for row in rows:
        if forms := _forms_of(row.values):
            fitting = known.setdefault(forms, _Fitting())
            fitting.count += 1
            if len(fitting.first) < _PLACES:
                fitting.first.append(row.where)
        else:
            what = f"the row is of no known form (its keys: {_some_keys(row.values)})"
            unknown.add(row.where, what, f"the forms are {_KNOWN}")
    common = frozenset.intersection(*known) if known else frozenset()
    if len(common) == 1:
        return next(iter(common))
    if common:
        what = f"the rows fit several forms: {', '.join(sorted(common))}"
        where = next(iter(known.values())).first[0]
        problems.add(where, what, "say which one is meant: data.form (`--form` of data check)")
    elif known:
        where = next(iter(known.values())).first[0]
        problems.add(where, f"rows of several forms: {_of_each(known)}", "bring all rows into one form")
    problems.extend(unknown)
    return None


def _forms_of(values: dict[str, Any]) -> frozenset[str]:
    # null counts as absent: in a table every row has every column
    return frozenset(form for form, (keys, _) in _KEYS.items() if all(values.get(key) is not None for key in keys))


def _some_keys(values: dict[str, Any]) -> str:
    return ", ".join(quoted(str(key), 30) for key in list(values)[:6]) or "none"


def _of_each(known: Mapping[frozenset[str], _Fitting]) -> str:
    shown = []
    named = {" or ".join(sorted(forms)): found for forms, found in known.items()}
    for form, found in sorted(named.items()):
        rest = f" and {found.count - len(found.first):,} more" if found.count > len(found.first) else ""
        shown.append(f"{form} in {', '.join(found.first)}{rest}")
    return "; ".join(shown)


def normalize(values: dict[str, Any], form: str, extra: Counter[str]) -> dict[str, Any]:
    """One row of `form` as `{"messages": [...]}` or `{"text": ...}`.

    Args:
        values: the row as it was read.
        form: one of FORMS.
        extra: counts the keys that are left out (`messages[].name` for keys of a turn).

    Raises:
        RowProblem: the first thing that is wrong with the row.
    """
    needed, optional = _KEYS[form]
    for key in needed:
        if values.get(key) is None:
            raise RowProblem(
                f"`{key}` is missing (the row's keys: {_some_keys(values)})",
                f"a row of form {form} needs {_and(needed)}",
            )
    extra.update(k for k, v in values.items() if k not in needed and k not in optional and v is not None)
    if form == "text":
        if not _string(values, "text").strip():
            raise RowProblem("the text is empty", "remove the row")
        return {"text": values["text"]}
    if form == "messages":
        turns = _turns(values["messages"], "messages", "role", "content", {role: role for role in ROLES}, extra)
    elif form == "sharegpt":
        turns = _turns(values["conversations"], "conversations", "from", "value", _SHAREGPT_ROLES, extra)
    elif form == "alpaca":
        more = _string(values, "input") if values.get("input") is not None else ""
        prompt = _string(values, "instruction") + (f"\n\n{more}" if more.strip() else "")
        turns = [_turn("user", prompt), _turn("assistant", _string(values, "output"))]
    else:
        turns = [_turn("user", _string(values, "prompt")), _turn("assistant", _string(values, "completion"))]
    _check_conversation(turns)
    return {"messages": turns}


def _turns(
    value: object, key: str, role_key: str, text_key: str, roles: dict[str, str], extra: Counter[str]
) -> list[dict[str, str]]:
    if not isinstance(value, list):
        raise RowProblem(
            f"`{key}` is {kind(value)}, not a list",
            f'write "{key}": [{{"{role_key}": …, "{text_key}": …}}, …]',
        )
    turns = []
    for number, item in enumerate(value, 1):
        if not isinstance(item, dict):
            raise RowProblem(
                f"turn {number} is {kind(item)}, not an object", f'a turn has "{role_key}" and "{text_key}"'
            )
        for needed in (role_key, text_key):
            if needed not in item:
                raise RowProblem(f"turn {number} has no `{needed}`", f'a turn has "{role_key}" and "{text_key}"')
        given, text = item[role_key], item[text_key]
        if not isinstance(given, str) or given not in roles:
            name = quoted(given, 30) if isinstance(given, str) else kind(given)
            raise RowProblem(f"turn {number} has the unknown role {name}", f"roles are {', '.join(roles)}")
        if not isinstance(text, str):
            raise RowProblem(
                f"turn {number}: `{text_key}` is {kind(text)}, not a string", "write the text as one string"
            )
        extra.update(f"{key}[].{k}" for k, v in item.items() if k not in (role_key, text_key) and v is not None)
        turns.append(_turn(roles[given], _unicode(text, f"turn {number}")))
    return turns


def _check_conversation(turns: list[dict[str, str]]) -> None:
    roles = [turn["role"] for turn in turns]
    if "assistant" not in roles:
        raise RowProblem(
            "the row has no assistant turn, so there is nothing to learn", "add the answer, or remove the row"
        )
    if "system" in roles[1:]:
        number = roles.index("system", 1) + 1
        raise RowProblem(
            f"turn {number} is a system turn, which only the first may be",
            "put it first, or join it to the first",
        )
    if "user" not in roles[: roles.index("assistant")]:
        number = roles.index("assistant") + 1
        raise RowProblem(
            f"turn {number} is an answer with no user turn before it", "add the question, or remove the turn"
        )
    for number, turn in enumerate(turns, 1):
        if turn["role"] in ("assistant", "user") and not turn["content"].strip():
            name = "answer" if turn["role"] == "assistant" else "user turn"
            at = "" if len(turns) == 2 else f" (turn {number})"
            raise RowProblem(f"the {name} is empty{at}", "write it, or remove the row")
    if roles[-1] != "assistant":
        raise RowProblem(f"the last turn is the {roles[-1]}'s and has no answer", "add the answer, or remove the turn")


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _string(values: dict[str, Any], key: str) -> str:
    value = values[key]
    if not isinstance(value, str):
        raise RowProblem(f"`{key}` is {kind(value)}, not a string", "write the text as one string")
    return _unicode(value, f"`{key}`")


def _unicode(text: str, what: str) -> str:
    """`text` itself; JSON can carry half of a surrogate pair, which no tokenizer and no UTF-8 file can."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowProblem(
            f"{what} holds half a character (\\u{ord(text[error.start]):04x} at position {error.start + 1})",
            "write the whole character, or remove it",
        ) from error
    return text


def _and(keys: Sequence[str]) -> str:
    return " and ".join(f"`{key}`" for key in keys)
