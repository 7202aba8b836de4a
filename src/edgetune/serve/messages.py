"""The messages of a request: text, calls of tools, and what tools said."""

from __future__ import annotations

from typing import Any

from edgetune.runtime.completion import Message
from edgetune.serve.error import ApiError

_ROLES = ("system", "developer", "user", "assistant", "tool")
# Further keys of a message may hold only these: clients send earlier answers back with such fields.
_EMPTY: tuple[Any, ...] = (None, [], {}, "")
_KEYS = {"assistant": {"tool_calls"}, "tool": {"tool_call_id", "name"}}


def read_message(message: dict[str, Any], where: str) -> Message:
    """A message for the chat template, text parts joined. Raises ApiError 400."""
    role = message.get("role")
    if role not in _ROLES:
        raise ApiError(
            400,
            f"{where}.role must be system, developer, user, assistant or tool, not {role!r}.",
            param=f"{where}.role",
            code="invalid_value" if role is not None else "missing_required_parameter",
        )
    allowed = {"role", "content"} | _KEYS.get(str(role), set())
    for key, value in message.items():
        if key not in allowed and value not in _EMPTY:
            raise ApiError(
                400,
                f"{where}.{key} is not supported for {role}; leave it out.",
                param=f"{where}.{key}",
                code="unsupported_parameter",
            )
    calls = message.get("tool_calls") if role == "assistant" else None
    content = message.get("content")
    # `developer` is the newer name of `system`; chat templates know the older one.
    found: Message = {
        "role": "system" if role == "developer" else str(role),
        "content": "" if calls and content is None else _text(content, f"{where}.content"),
    }
    if calls:
        found["tool_calls"] = _calls(calls, f"{where}.tool_calls")
    for key in ("tool_call_id", "name"):
        if role == "tool" and message.get(key):
            found[key] = _string(message[key], f"{where}.{key}")  # type: ignore[literal-required]
    return found


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise ApiError(400, f"{where} must be a list.", param=where, code="invalid_value")
    for place, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            at = f"{where}[{place}].function"
            raise ApiError(400, f"{at} is missing.", param=at, code="missing_required_parameter")
        for key in ("name", "arguments"):
            _string(function.get(key), f"{where}[{place}].function.{key}")
    return calls


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ApiError(400, f"{where} must be a string.", param=where, code="invalid_value")
    return value


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise ApiError(400, f"{where} must be a string or a list of text parts.", param=where, code="invalid_value")
    texts = []
    for i, part in enumerate(content):
        at = f"{where}[{i}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise ApiError(
                400,
                f"{at}.type: {kind!r} is not supported; this model reads text only.",
                param=f"{at}.type",
                code="unsupported_parameter",
            )
        if not isinstance(part.get("text"), str):
            raise ApiError(400, f"{at}.text must be a string.", param=f"{at}.text", code="invalid_value")
        texts.append(part["text"])
    return "".join(texts)  # nothing between them: the model reads what the client wrote


def with_system(messages: list[Message], system: str | None) -> list[Message]:
    """A conversation with the service's system prompt in front, where it has one, and the conversation none."""
    if system is None or any(message["role"] == "system" for message in messages):
        return messages
    return [{"role": "system", "content": system}, *messages]
