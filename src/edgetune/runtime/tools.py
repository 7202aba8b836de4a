"""Calls of functions in what a model writes.

Four ways of writing them are read, whatever the model:

- Hermes, Qwen: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, one or several;
- Phi-4-mini: `<|tool_call|>[{"name": …, "arguments": {…}}, …]<|/tool_call|>`, or `functools[{…}, …]`;
- Mistral: `[TOOL_CALLS] [{"name": …, "arguments": {…}}, …]`, or `[TOOL_CALLS]name[ARGS]{…}`, with `[CALL_ID]…` behind the name or not;
- Llama 3: the whole answer is `{"name": …, "parameters": {…}}`, several with `;` between, with or without
  `<|python_tag|>` in front; or `<function=name>{…}</function>`.

The name and the arguments may lie in an object `function`, as OpenAI's API has them. A call counts only where it is whole, its name is
that of a tool, and its arguments are an object. All else stays text, calls in Python's syntax (`[name(x=1)]`) among it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from edgetune.errors import InputError
from edgetune.runtime.completion import ToolCall

# What a list of calls, or one call, may begin with, and what ends it; no end: nothing, or the end of the answer.
_MARKS = {
    "<tool_call>": "</tool_call>", "<|tool_call|>": "<|/tool_call|>", "[TOOL_CALLS]": "", "<|python_tag|>": "",
    "functools[": "", "<function=": "</function>",
}  # fmt: skip
_BEHIND_NAME = {"[TOOL_CALLS]": "[ARGS]", "<function=": ">"}  # where the name stands before its arguments
_CALL_ID = "[CALL_ID]"
MARKS = frozenset(_MARKS) | {end for end in _MARKS.values() if end} | {"[ARGS]", _CALL_ID}


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


_json = json.JSONDecoder(
    strict=False, parse_constant=_no_number
)  # small models write line ends into strings as they are


def checked_tools(tools: Any) -> list[dict[str, Any]]:
    """Descriptions of functions as OpenAI's API has them, checked. Raises InputError."""
    if not isinstance(tools, list | tuple):
        raise InputError("must be a list", where="tools")
    for place, tool in enumerate(tools):
        function = (
            tool.get("function") if isinstance(tool, dict) and tool.get("type", "function") == "function" else None
        )
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise InputError('needs {"type": "function", "function": {"name": …}}', where=f"tools[{place}]")
        if not isinstance(function.get("parameters", {}), dict):
            raise InputError("must be a JSON Schema object", where=f"tools[{place}].function.parameters")
    return [{"type": "function", **tool} for tool in tools]


def call_schema(tools: Sequence[dict[str, Any]], name: str | None = None) -> dict[str, Any]:
    """The JSON Schema of an answer that is a call of one of the tools, or of the one that is named.

    Raises:
        InputError: there is no such tool.
    """
    functions = [tool["function"] for tool in tools if name in (None, tool["function"]["name"])]
    if not functions:
        what = f"there is no tool {name!r}" if name else "there are no tools to choose from"
        raise InputError(what, where="tool_choice")
    forms = [
        {
            "type": "object",
            "properties": {
                "name": {"const": function["name"]},
                "arguments": {"type": "object", **(function.get("parameters") or {})},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for function in functions
    ]
    return forms[0] if len(forms) == 1 else {"anyOf": forms}


class ToolFilter:
    """Passes text on, and holds what may become a call.

    What is held until the end: all from the first mark on, and an answer that begins with `{`. So nothing of a call is
    ever shown as text, wherever the pieces are cut.

    Args:
        names: of the tools.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)
        self._held, self._begun, self._holds = "", False, False

    def feed(self, text: str) -> str:
        """Take the next piece; returns what may be shown now."""
        self._held += text
        if not self._begun and not self._held.strip():
            return ""
        if not self._begun:
            self._begun, self._holds = True, self._held.lstrip().startswith("{")
        if self._holds:
            return ""
        at = min((place for mark in _MARKS if (place := self._held.find(mark)) >= 0), default=-1)
        if at >= 0:
            self._holds = True
        else:
            at = len(self._held) - max(_overlap(self._held, mark) for mark in _MARKS)
        shown, self._held = self._held[:at], self._held[at:]
        return shown

    def rest(self) -> tuple[str, tuple[ToolCall, ...]]:
        """What was held when the text has ended: the text around the calls, and the calls."""
        rest, self._held = self._held, ""
        return parse(rest, self._names) if self._holds else (rest, ())


def parse(text: str, names: Collection[str]) -> tuple[str, tuple[ToolCall, ...]]:
    """Take the calls out of a text.

    Args:
        text: what the model wrote.
        names: of the tools.

    Returns:
        The text without them, without white space around it where there are calls; and the calls.
    """
    found = _bare(text.strip(), names)
    if found:
        return "", tuple(found)
    calls: list[ToolCall] = []
    kept, at = [], 0
    while True:
        mark = min((mark for mark in _MARKS if text.find(mark, at) >= 0), key=lambda m: text.find(m, at), default=None)
        if mark is None:
            break
        start = text.find(mark, at)
        read = _marked(text, start, mark, names)
        kept.append(text[at:start])
        if read is None:
            kept.append(mark)
            at = start + len(mark)
        else:
            calls += read.calls
            at = read.end
    kept.append(text[at:])
    left = "".join(kept)
    return (left.strip() if calls else left), tuple(calls)


@dataclass(frozen=True)
class _Read:
    calls: list[ToolCall]
    end: int


def _marked(text: str, start: int, mark: str, names: Collection[str]) -> _Read | None:
    """The calls behind a mark, and where they end."""
    at, end_mark = start + len(mark) - mark.endswith("["), _MARKS[mark]
    read = _values(text, at)
    if read is None and mark in _BEHIND_NAME:
        read = _named(text, at, _BEHIND_NAME[mark])
    if read is None:
        return None
    values, end = read
    after = text[end:].lstrip()
    if end_mark and after.startswith(end_mark):
        end = len(text) - len(after) + len(end_mark)
    elif end_mark and after:  # without its end only where the answer ends there
        return None
    calls = [_call(value, names, text[start:end]) for value in values]
    return _Read([call for call in calls if call], end) if calls and all(calls) else None


def _bare(text: str, names: Collection[str]) -> list[ToolCall] | None:
    """Llama 3's calls: nothing else in the whole text."""
    if not text.startswith("{"):
        return None
    read = _values(text, 0)
    if read is None or text[read[1] :].strip():
        return None
    calls = [_call(value, names, text) for value in read[0]]
    return [call for call in calls if call] if all(calls) else None


def _values(text: str, at: int) -> tuple[list[Any], int] | None:
    """A JSON list, or one or several values with `;` between; and where they end."""
    values: list[Any] = []
    while True:
        at += len(text[at:]) - len(text[at:].lstrip())
        try:
            value, at = _json.raw_decode(text, at)
        except (ValueError, RecursionError):
            return None
        if isinstance(value, list) and not values:
            return value, at
        values.append(value)
        after = text[at:].lstrip()
        if not after.startswith(";"):
            return values, at
        at = len(text) - len(after) + 1


def _named(text: str, at: int, behind: str) -> tuple[list[Any], int] | None:
    """The name, what stands behind it, the arguments; and where they end."""
    name, found, _ = text[at:].partition(behind)
    read = _values(text, at + len(name) + len(behind)) if found else None
    name = name.partition(_CALL_ID)[0].strip()
    return ([{"name": name, "arguments": read[0][0]}], read[1]) if read and len(read[0]) == 1 else None


def _call(value: Any, names: Collection[str], raw: str) -> ToolCall | None:
    if not isinstance(value, dict):
        return None
    inner = value.get("function")
    value = inner if isinstance(inner, dict) else value
    name = value.get("name", inner)
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):  # some write the object as a string
        try:
            arguments = _json.decode(arguments)
        except (ValueError, RecursionError):
            return None
    if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
        return None
    return ToolCall(name, arguments, raw)


def _overlap(text: str, mark: str) -> int:
    """How many of the last characters are the beginning of `mark`."""
    most = min(len(mark) - 1, len(text))
    return next((n for n in range(most, 0, -1) if text.endswith(mark[:n])), 0)
