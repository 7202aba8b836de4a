"""Chat templates: ONNX Runtime GenAI's own renderer, or Jinja in its sandbox where that one falls short.

The native renderer knows most of the templates in use, and no tools. Where it refuses a template, or gives other text
than the training did (golden.json), Jinja renders it as transformers does: blocks trimmed, loop controls, `tojson`
without escapes, `raise_exception` and `strftime_now`. A template is data of strangers: the sandbox lets it read what it
is given, and change or call nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from edgetune.errors import EdgetuneError, InputError, first_line
from edgetune.files import read_json
from edgetune.runtime import checks
from edgetune.runtime.artifact import Artifact
from edgetune.runtime.completion import Message

_FIX = "some templates take no system turn, or want user and assistant in turns"
_KEYS = {"role", "content", "tool_calls", "tool_call_id", "name"}
_MAX_TEMPLATE = 1 << 20
# What code in a template runs into, where a conversation has not the form that it expects.
_OF_TEMPLATES = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)


class Template:
    """Renders conversations.

    Args:
        artifact: whose template it is.
        tokenizer: the native tokenizer, which knows it too.

    Attributes:
        sandboxed: whether Jinja renders, and not the native side.
    """

    def __init__(self, artifact: Artifact, tokenizer: Any) -> None:
        self._artifact, self._tokenizer = artifact, tokenizer
        self._jinja: Callable[..., str] | None = None
        self.sandboxed = False

    def render(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> str:
        """The text of a conversation, up to where the assistant's answer begins.

        Args:
            messages: the turns.
            tools: functions that the model may call, as OpenAI's API describes them.

        Raises:
            InputError: a message is malformed, the template refuses the conversation, or it knows no tools.
        """
        turns = [_turn(message, number) for number, message in enumerate(messages, 1)]
        if not tools and not self.sandboxed and not any(turn.keys() - {"role", "content"} for turn in turns):
            return self.native(turns)
        text = self.sandbox(turns, tools)
        if tools and text == self.sandbox(turns):
            raise InputError(
                "the model's chat template knows no tools", where="tools", fix="describe them in a message"
            )
        return text

    def settle(self, golden: Sequence[tuple[Sequence[Message], str]]) -> None:
        """Choose who renders: the native side, unless only Jinja gives the texts that the training had.

        Args:
            golden: conversations and their texts.
        """
        if not all(self._gives(self.native, messages, text) for messages, text in golden):
            self.sandboxed = all(self._gives(self.sandbox, messages, text) for messages, text in golden)

    def _gives(self, render: Callable[[Sequence[Any]], str], messages: Sequence[Message], text: str) -> bool:
        try:
            return render(messages) == text
        except EdgetuneError:
            return False

    def native(self, turns: Sequence[Any]) -> str:
        """What the native renderer makes of it. Raises InputError."""
        try:
            return str(self._tokenizer.apply_chat_template(json.dumps(list(turns)), add_generation_prompt=True))
        except RuntimeError as error:
            raise _refusal(first_line(error)[:300]) from error

    def sandbox(self, turns: Sequence[Any], tools: Sequence[dict[str, Any]] = ()) -> str:
        """What Jinja makes of it. Raises InputError."""
        from jinja2 import TemplateError

        if self._jinja is None:
            self._jinja = _compiled(self._artifact)
        try:
            return self._jinja(messages=list(turns), tools=list(tools) or None)
        except (*_OF_TEMPLATES, TemplateError) as error:
            raise _refusal(first_line(error)[:300]) from error


def _turn(message: Any, number: int) -> dict[str, Any]:
    """A message as templates expect it: arguments of calls as objects, and content a string even beside calls."""
    where = f"message {number}"
    if not isinstance(message, Mapping):
        raise InputError(f'must be {{"role": …, "content": …}}, not {checks.shown(message)}', where=where)
    calls = message.get("tool_calls")
    if calls is not None:
        calls = checks.items(f"{where}.tool_calls", calls, "a list of calls")
    content = "" if calls and message.get("content") is None else message.get("content")
    if not isinstance(message.get("role"), str) or not isinstance(content, str):
        raise InputError("needs role and content, both strings", where=where)
    checks.text(f"{where}.role", message["role"])
    checks.text(f"{where}.content", content)
    turn = {key: message[key] for key in message if key in _KEYS and message[key] is not None}
    turn["content"] = content
    if calls:
        turn["tool_calls"] = [_call(call, f"{where}.tool_calls[{place}]") for place, call in enumerate(calls)]
    return turn


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InputError('needs {"function": {"name": …, "arguments": …}}', where=where)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise InputError(f"its arguments are no JSON: {error}", where=where) from error
    if not isinstance(arguments, dict):
        raise InputError("its arguments must be a JSON object", where=where)
    return {**call, "type": "function", "function": {**function, "arguments": arguments}}


def _compiled(artifact: Artifact) -> Callable[..., str]:
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise, strftime_now=lambda form: datetime.now().strftime(form))
    settings = read_json(artifact.path / "tokenizer_config.json")
    path = artifact.path / "chat_template.jinja"
    source = path.read_text(encoding="utf-8") if path.is_file() else settings.get("chat_template")
    if not isinstance(source, str) or len(source) > _MAX_TEMPLATE:
        raise EdgetuneError("has no chat template", where=path, fix="export it again")
    names = {name: _special(settings[name]) for name in settings if name.endswith("_token")}
    try:
        template = environment.from_string(source)
    except TemplateError as error:
        raise EdgetuneError(f"the chat template is broken: {first_line(error)[:300]}", where=path) from error
    return lambda **given: template.render(**names, **given, add_generation_prompt=True)


def _special(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _to_json(value: Any, indent: int | None = None, **style: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **style)


def _raise(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _refusal(why: str) -> InputError:
    return InputError(f"the model's chat template refuses this conversation: {why}", fix=_FIX)
