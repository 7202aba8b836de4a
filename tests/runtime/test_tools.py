"""Calls of tools: the common ways of writing them, pieces of any size, and text that is none."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edgetune.errors import InputError
from edgetune.runtime.tools import MARKS, ToolFilter, checked_tools, parse

NAMES = ("weather", "add")
PARIS: dict[str, Any] = {"city": "Paris"}


def call(name: str = "weather", arguments: Any = None, key: str = "arguments") -> str:
    return json.dumps({"name": name, key: PARIS if arguments is None else arguments})


WRITTEN = [
    f"<tool_call>\n{call()}\n</tool_call>",
    f"<tool_call>{call()}",  # the answer ended before the closing mark
    f"<|tool_call|>[{call()}]<|/tool_call|>",
    f"[TOOL_CALLS] [{call()}]",
    f"[TOOL_CALLS]weather[ARGS]{json.dumps(PARIS)}",
    call(key="parameters"),
    f"\n {call(key='parameters')} \n",
    f"<|python_tag|>{call(key='parameters')}",
    f"<tool_call>{call(arguments=json.dumps(PARIS))}</tool_call>",  # the object as a string
    f"functools[{call()}]",
    f"[TOOL_CALLS]weather[CALL_ID]a1B2[ARGS]{json.dumps(PARIS)}",
    f"<function=weather>{json.dumps(PARIS)}</function>",
    '{"type": "function", "function": "weather", "parameters": {"city": "Paris"}}',
    f'<|tool_call|>[{{"type": "function", "function": {call()}}}]<|/tool_call|>',
]


@pytest.mark.parametrize("text", WRITTEN)
def test_one_call(text: str) -> None:
    left, calls = parse(text, NAMES)
    assert left == "" and [(c.name, c.arguments) for c in calls] == [("weather", PARIS)]
    assert calls[0].raw in text and "weather" in calls[0].raw


@pytest.mark.parametrize("text", [
    f"I look.\n<tool_call>{call()}</tool_call>\n<tool_call>{call('add', {'a': 1})}</tool_call>\nDone.",
    f"I look.\n<|tool_call|>[{call()}, {call('add', {'a': 1})}]<|/tool_call|>Done.",
    f"I look.\n[TOOL_CALLS] [{call()}, {call('add', {'a': 1})}]Done.",
    f"I look.\n<|python_tag|>{call(key='parameters')}; {call('add', {'a': 1}, 'parameters')}Done.",
])  # fmt: skip
def test_several_calls_and_text(text: str) -> None:
    left, calls = parse(text, NAMES)
    assert left.split() == ["I", "look.", "Done."]
    assert [(c.name, c.arguments) for c in calls] == [("weather", PARIS), ("add", {"a": 1})]


@pytest.mark.parametrize("text", [
    "",
    "  \n",
    "No call at all.",
    call("unknown"),
    '{"city": "Paris"}',
    call()[:-1],
    call() + " and more",
    f"<tool_call>{call('unknown')}</tool_call>",
    f"<tool_call>{call()[:-2]}</tool_call>",
    f"<tool_call>{call()} and more</tool_call>",
    "<tool_call></tool_call>",
    "<tool_call>[]</tool_call>",
    "<|tool_call|>[1]<|/tool_call|>",
    "[TOOL_CALLS] weather",
    "[TOOL_CALLS]weather[ARGS][1]",
    f"<tool_call>{call(arguments=[1])}</tool_call>",
    f"<tool_call>{call(arguments='x')}</tool_call>",
    '<tool_call>{"name": "weather", "arguments": {"a": NaN}}</tool_call>',
    '<tool_call>' + '{"name":' * 5000,
    "a < b, <tool_, [TOOL",
    "functools[0] and functools.partial",
    "<function=unknown>{}</function>",
    "[weather(city='Paris')]",
    '{"function": {"arguments": {}}}',
])  # fmt: skip
def test_what_is_no_call_stays(text: str) -> None:
    assert parse(text, NAMES) == (text, ())


PARTS = st.sampled_from(
    [*sorted(MARKS), *WRITTEN, call("unknown"), "{", "}", ";", "I look. ", "\n", "<", "[TOOL_", "👋"]
)


@given(st.lists(st.one_of(PARTS, st.text(max_size=5)), max_size=8), st.data())
@example(["{", "x"], None)
@example([" ", "<tool_call>"], None)
def test_pieces_do_not_matter(parts: list[str], data: Any) -> None:
    """However the text is cut: the same is shown, nothing of it is lost, and no part of a call is ever shown."""
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6))) if data else [1]
    filtered = ToolFilter(NAMES)
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    shown = "".join(filtered.feed(piece) for piece in pieces)
    assert text.startswith(shown)
    assert not any(mark in shown for mark in ("<tool_call>", "<|tool_call|>", "[TOOL_CALLS]", "<|python_tag|>"))
    left, calls = filtered.rest()
    whole = ToolFilter(NAMES)
    first = whole.feed(text)
    assert (first + "".join(whole.rest()[0]), len(calls)) == (shown + left, len(parse(text, NAMES)[1]))
    if not calls:
        assert shown + left == text
    for found in calls:
        assert found.name in NAMES and found.raw in text


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8,
))  # fmt: skip
def test_arguments_come_back(value: Any) -> None:
    for form in ("<tool_call>{}</tool_call>", "<|tool_call|>[{}]<|/tool_call|>", "[TOOL_CALLS] [{}]", "{}"):
        for ascii_only in (True, False):
            body = json.dumps({"name": "add", "arguments": {"value": value}}, ensure_ascii=ascii_only)
            left, calls = parse(form.replace("{}", body), NAMES)
            assert left == "" and [c.arguments for c in calls] == [{"value": value}]


@pytest.mark.parametrize(("tools", "where"), [
    ("x", "tools"),
    ([1], "tools[0]"),
    ([{"type": "web_search"}], "tools[0]"),
    ([{"function": {"name": ""}}], "tools[0]"),
    ([{"function": {"name": "a"}}, {"function": {}}], "tools[1]"),
    ([{"function": {"name": "a", "parameters": []}}], "tools[0].function.parameters"),
])  # fmt: skip
def test_broken_tools(tools: Any, where: str) -> None:
    with pytest.raises(InputError) as caught:
        checked_tools(tools)
    assert caught.value.where == where
