"""The wire format: OpenAI's chat completions, as far as this service speaks it.

Follows the published reference of `POST /v1/chat/completions`, of `GET /v1/models` and of the error object.
What a request asks for is done, or refused with the parameter's name: nothing that would change the answer
is passed over.
"""

from __future__ import annotations

import time
import uuid
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from edgetune.errors import InputError
from edgetune.runtime.options import GenerationOptions
from edgetune.runtime.session import Message

MAX_STOPS = 4

# Parameters that do not change the answer: any value is fine.
_HARMLESS = {
    "metadata",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
# Parameters that this service does not have, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
# Further keys of a message may hold only these: clients send earlier answers back with such fields.
_MESSAGE_EMPTY: tuple[Any, ...] = (None, [], {}, "")


class ApiError(Exception):
    """A refusal or a failure, as the client gets it.

    Args:
        status: HTTP status.
        message: what is wrong and what to do, for the person who reads the client's log.
        param: the request's parameter that is to blame.
        code: a short fixed word for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class StreamOptions(_Part):
    """`stream_options`."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against eavesdroppers; there is none on loopback


class ChatRequest(_Part):
    """The body of `POST /v1/chat/completions`, checked. `null` means "not given" throughout."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")

    model: str
    messages: list[dict[str, JsonValue]] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Ranges are GenerationOptions' business.
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None  # not OpenAI's, but widely sent through `extra_body`
    seed: int | None = None
    stop: Any = None
    response_format: Any = None

    @classmethod
    def parse(cls, body: bytes) -> ChatRequest:
        """Read a JSON body. Raises ApiError 400 that names the parameter."""
        try:
            request = cls.model_validate_json(body)
        except ValidationError as error:
            raise _refusal(error) from None
        for key, value in (request.model_extra or {}).items():
            _check_extra(key, value)
        if request.stream_options and not request.stream:
            raise ApiError(400, "stream_options needs stream=true.", param="stream_options", code="invalid_value")
        return request

    def conversation(self) -> list[Message]:
        """The messages as `role` and `content` strings, text parts joined. Raises ApiError 400."""
        return [_message(message, f"messages[{i}]") for i, message in enumerate(self.messages)]

    def options(self) -> GenerationOptions:
        """What the model is asked to do. Raises ApiError 400."""
        limit = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        if limit == "max_completion_tokens" and self.max_tokens not in (None, self.max_completion_tokens):
            raise ApiError(
                400,
                "max_tokens and max_completion_tokens differ; send one of them.",
                param="max_tokens",
                code="invalid_value",
            )
        given: dict[str, Any] = {
            "max_tokens": getattr(self, limit),
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "seed": self.seed,
            "stop": _stops(self.stop),
            "json_schema": _json_schema(self.response_format),
        }
        try:
            return GenerationOptions(**{key: value for key, value in given.items() if value is not None})
        except InputError as error:
            param = limit if error.where == "max_tokens" else error.where
            raise ApiError(400, f"{param}: {error.what}.", param=param, code="invalid_value") from None


def _refusal(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        reason = str(first.get("ctx", {}).get("error", "not JSON"))
        return ApiError(400, f"The body is not valid JSON: {reason}.", code="invalid_json")
    param = ""
    for step in first["loc"]:
        param += f"[{step}]" if isinstance(step, int) else f"{'.' if param else ''}{step}"
    if not param:
        return ApiError(400, "The body must be a JSON object.", code="invalid_json")
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    return ApiError(400, f"{param}: {first['msg']}.", param=param, code=code)


def _check_extra(key: str, value: Any) -> None:
    if value is None or key in _HARMLESS or value in _NEUTRAL.get(key, ()):
        return
    if key in _NEUTRAL:
        raise ApiError(
            400,
            f"{key} is not supported by this service; leave it out.",
            param=key,
            code="unsupported_parameter",
        )
    raise ApiError(400, f"{key} is not a parameter of this service; leave it out.", param=key, code="unknown_parameter")


def _message(message: dict[str, Any], where: str) -> Message:
    role = message.get("role")
    if role not in ("system", "developer", "user", "assistant"):
        raise ApiError(
            400,
            f"{where}.role must be system, developer, user or assistant, not {role!r}.",
            param=f"{where}.role",
            code="invalid_value" if role is not None else "missing_required_parameter",
        )
    for key, value in message.items():
        if key not in ("role", "content") and value not in _MESSAGE_EMPTY:
            raise ApiError(
                400,
                f"{where}.{key} is not supported; send role and content only.",
                param=f"{where}.{key}",
                code="unsupported_parameter",
            )
    # `developer` is the newer name of `system`; chat templates know the older one.
    return {
        "role": "system" if role == "developer" else role,
        "content": _text(message.get("content"), f"{where}.content"),
    }


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


def _stops(stop: Any) -> tuple[str, ...] | None:
    if stop is None:
        return None
    stops = [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(stops, list)
        or not all(isinstance(text, str) and text for text in stops)
        or len(stops) > MAX_STOPS
    ):
        raise ApiError(
            400,
            f"stop must be a string or a list of up to {MAX_STOPS} strings, none of them empty.",
            param="stop",
            code="invalid_value",
        )
    return tuple(stops)


def _json_schema(response_format: Any) -> Any:
    if response_format is None:
        return None
    kind = response_format.get("type") if isinstance(response_format, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        raise ApiError(
            400,
            "response_format.type must be text, json_object or json_schema.",
            param="response_format.type",
            code="invalid_value",
        )
    described = response_format.get("json_schema")
    schema = described.get("schema") if isinstance(described, dict) else None
    if not isinstance(schema, dict):
        raise ApiError(
            400,
            "response_format.json_schema.schema must be a JSON Schema object.",
            param="response_format.json_schema.schema",
            code="invalid_value",
        )
    return schema


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """The `usage` object of an answer."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class Reply:
    """Makes the JSON objects of one answer: they share an id and a time.

    Args:
        model: the model's name.
        include_usage: whether streamed pieces carry `usage`, null in all but the last.
    """

    def __init__(self, model: str, include_usage: bool = False) -> None:
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._usage = {"usage": None} if include_usage else {}

    def whole(self, text: str, finish_reason: str, used: dict[str, int]) -> dict[str, Any]:
        """The answer in one piece (`chat.completion`)."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": used}

    def chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        """One streamed piece (`chat.completion.chunk`)."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice], **self._usage}

    def usage_chunk(self, used: dict[str, int]) -> dict[str, Any]:
        """The last streamed piece where `stream_options.include_usage` was set: no choice, only the count."""
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": used}


def model_object(name: str, created: int) -> dict[str, Any]:
    """An entry of `/v1/models`."""
    return {"id": name, "object": "model", "created": created, "owned_by": "edgetune"}
