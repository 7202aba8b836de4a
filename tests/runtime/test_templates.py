"""Chat templates in Jinja's sandbox: against transformers, where the native side falls short, and hostile ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from artifacts import copy_of, edit_json, seal, tiny_artifact, widen  # noqa: F401
from edgetune import runtime
from edgetune.errors import InputError
from edgetune.runtime.options import GenerationOptions
from edgetune.runtime.prefix import Context
from edgetune.runtime.session import Session

ASK: Any = [{"role": "user", "content": "Is it warm in Paris?"}]
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "How warm is it? <é>",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
TOOLED = """\
{%- if tools %}
<|im_start|>system
{% for tool in tools %}
{{ tool | tojson }}
{% endfor %}
<|im_end|>
{% endif %}
{% for message in messages %}
    {% if message.role == 'system' and loop.index0 > 0 %}{% continue %}{% endif %}
<|im_start|>{{ message.role }}
{{ message.content }}
    {%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
    {%- endfor %}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""
TURNS: Any = [
    *ASK,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
        ],
    },
    {"role": "tool", "content": "21 °C", "tool_call_id": "1"},
]


@pytest.fixture
def copy(tiny_artifact: Path, tmp_path: Path) -> Path:  # noqa: F811
    return copy_of(tiny_artifact, tmp_path)


def put(artifact: Path, template: str, tiny_model: Path) -> Any:
    """Give an artifact another template, with golden prompts as transformers renders them; returns that tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = template
    (artifact / "chat_template.jinja").write_text(template)
    prompts = json.loads((artifact / "golden.json").read_text())["prompts"]
    for prompt in prompts:
        prompt["text"] = tokenizer.apply_chat_template(prompt["messages"], tokenize=False, add_generation_prompt=True)
        prompt["ids"] = tokenizer(prompt["text"], add_special_tokens=False)["input_ids"]
    edit_json(artifact / "golden.json", prompts=prompts)
    widen(artifact)
    seal(artifact)
    return tokenizer


@pytest.fixture
def tooled(copy: Path, tiny_model: Path) -> Iterator[tuple[Session, Any]]:
    tokenizer = put(copy, TOOLED, tiny_model)
    with runtime.load(copy) as session:
        yield session, tokenizer


def test_same_as_transformers(tooled: tuple[Session, Any]) -> None:
    session, tokenizer = tooled
    for messages in (ASK, TURNS, [{"role": "system", "content": "Short."}, *ASK]):
        known = [{**message, "content": message["content"] or ""} for message in messages]
        for message in known:
            for call in message.get("tool_calls", []):
                call = call["function"]
                if isinstance(call["arguments"], str):
                    call["arguments"] = json.loads(call["arguments"])
        for tools in (None, TOOLS):
            text = tokenizer.apply_chat_template(known, tools=tools, tokenize=False, add_generation_prompt=True)
            assert session.render(messages, tools or ()) == text


def test_a_template_that_the_native_side_cannot_render(copy: Path, tiny_model: Path) -> None:
    ours = "{% set found = namespace(n=0) %}{% for m in messages %}{% set found.n = found.n + 1 %}" + (
        "{{ '%s|%d|%s' | format(m.role, found.n, m.content | trim | truncate(500)) }}{% endfor %}{{ eos_token }}"
    )
    put(copy, ours, tiny_model)
    with runtime.load(copy) as session:
        assert session._template.sandboxed
        assert session.render(ASK) == "user|1|Is it warm in Paris?<|im_end|>"
        assert session.generate(ASK, GenerationOptions(max_tokens=2)).completion_tokens == 2


@pytest.mark.parametrize("attack", [
    "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''.__class__.__base__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ messages.append(1) }}",
    "{% for i in range(1000000) %}x{% endfor %}",
    "{% include '/etc/passwd' %}",
])  # fmt: skip
def test_hostile_templates(copy: Path, attack: str) -> None:
    (copy / "chat_template.jinja").write_text(attack)
    seal(copy)
    with pytest.raises(Exception, match=r"golden prompt 1|refuses this conversation"):
        runtime.load(copy)


def test_tools_that_a_template_does_not_know(tiny_artifact: Path) -> None:  # noqa: F811
    with runtime.load(tiny_artifact) as session, pytest.raises(InputError, match="knows no tools"):
        session.generate(ASK, tools=TOOLS)


@pytest.mark.parametrize(
    "call", [1, {}, {"function": {"name": "a", "arguments": "{"}}, {"function": {"name": "a", "arguments": "[]"}}]
)
def test_broken_calls_in_messages(tooled: tuple[Session, Any], call: Any) -> None:
    with pytest.raises(InputError, match=r"message 2.tool_calls\[0\]"):
        tooled[0].render([*ASK, {"role": "assistant", "content": "", "tool_calls": [call]}])


class Scripted:
    """A native generator that says what it is told."""

    def __init__(self, ids: list[int]) -> None:
        self.left = list(ids)

    def append_tokens(self, ids: list[int]) -> None: ...

    def generate_next_token(self) -> None:
        self.now = self.left.pop(0)

    def get_next_tokens(self) -> list[int]:
        return [self.now]

    def is_done(self) -> bool:
        return not self.left


def test_an_answer_with_a_call(tooled: tuple[Session, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    session, _ = tooled
    said = 'I look. <tool_call>\n{"name": "weather", "arguments": {"city": "東京"}}\n</tool_call>'
    ids = [*session.encode(said), 2]
    monkeypatch.setattr(session._reader, "begin", lambda *_: Context(Scripted(ids), None, 1000))
    pieces = list(session.stream(ASK, GenerationOptions(max_tokens=500), tools=TOOLS))
    done = pieces[-1].completion
    assert done is not None and (done.finish_reason, done.ids) == ("stop", tuple(ids))
    assert done.text == "".join(piece.text for piece in pieces) == "I look. "
    (call,) = done.tool_calls
    assert (call.name, call.arguments, call.raw) == ("weather", {"city": "東京"}, said.removeprefix("I look. "))
    assert done.as_dict()["tool_calls"][0]["name"] == "weather"
    monkeypatch.setattr(session._reader, "begin", lambda *_: Context(Scripted(ids), None, 1000))
    plain = session.generate(ASK, GenerationOptions(max_tokens=500))
    assert plain.text == said and plain.tool_calls == ()


def test_marks_that_are_special_tokens(copy: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistral's mark is a special token, which decoding leaves out."""
    found = json.loads((copy / "tokenizer.json").read_text())
    found["added_tokens"][0]["content"] = "[TOOL_CALLS]"  # was <|endoftext|>
    found["model"]["vocab"]["[TOOL_CALLS]"] = found["model"]["vocab"].pop("<|endoftext|>")
    (copy / "tokenizer.json").write_text(json.dumps(found))
    put(copy, TOOLED, tiny_model)
    with runtime.load(copy) as session:
        ids = [0, *session.encode('[{"name": "weather", "arguments": {}}]'), 2]
        monkeypatch.setattr(session._reader, "begin", lambda *_: Context(Scripted(ids), None, 1000))
        done = session.generate(ASK, GenerationOptions(max_tokens=500), tools=TOOLS)
        assert (done.text, [call.name for call in done.tool_calls]) == ("", ["weather"])
