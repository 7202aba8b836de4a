"""The wire format: OpenAI's chat completions, as far as this service speaks it.

Follows the published reference of `POST /v1/chat/completions`, of `GET /v1/models` and of the error object.
What a request asks for is done, or refused with the parameter's name: nothing that would change the answer
is passed over.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from edgetune.errors import InputError
from edgetune.runtime.completion import Message
from edgetune.runtime.options import GenerationOptions
from edgetune.runtime.tools import call_schema, checked_tools
from edgetune.serve.error import ApiError
from edgetune.serve.messages import read_message

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
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
}
# Parameters that are options of the runtime under the same name.
_SAME = (
    "temperature", "top_p", "top_k", "min_p", "seed", "prompt_logprobs", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "speculation", "exact",
)  # fmt: skip
_CONSTRAINTS = {"json": "json_schema", "regex": "regex", "grammar": "grammar"}


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
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    seed: int | None = None
    stop: Any = None
    response_format: Any = None
    tools: list[JsonValue] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    # Not OpenAI's; sent through `extra_body` under the names that vLLM and llama-server have for them.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    prompt_logprobs: int | None = None
    structured_outputs: Any = None
    cache_prompt: bool | None = None
    # Ours: see GenerationOptions.
    speculation: Any = None
    exact: bool | None = None

    @classmethod
    def parse(cls, body: bytes) -> ChatRequest:
        """Read a JSON body. Raises ApiError 400 that names the parameter."""
        try:
            request = cls.model_validate_json(body)
        except ValidationError as error:
            raise _refusal(error) from None
        for key, value in (request.model_extra or {}).items():
            _check_extra(key, value)
        if request.stream and request.prompt_logprobs is not None:
            what = "prompt_logprobs is not available with stream=true; leave one of them out."
            raise ApiError(400, what, param="prompt_logprobs", code="invalid_value")
        if request.stream_options and not request.stream:
            raise ApiError(400, "stream_options needs stream=true.", param="stream_options", code="invalid_value")
        return request

    def conversation(self) -> list[Message]:
        """The messages for the chat template, text parts joined. Raises ApiError 400."""
        return [read_message(message, f"messages[{i}]") for i, message in enumerate(self.messages)]

    def functions(self) -> list[dict[str, Any]]:
        """The tools that the model may call. Raises ApiError 400."""
        try:
            tools = checked_tools(self.tools or [])
            self._forced(tools)
        except InputError as error:
            raise ApiError(400, f"{error.where}: {error.what}.", param=error.where, code="invalid_value") from None
        return [] if self.tool_choice == "none" else tools

    def _forced(self, tools: list[dict[str, Any]]) -> dict[str, Any] | None:
        """The JSON Schema of an answer that must be a call, where `tool_choice` says so."""
        choice = self.tool_choice
        if choice in (None, "auto", "none"):
            return None
        named = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
        name = named.get("name") if isinstance(named, dict) else None
        if choice != "required" and not isinstance(name, str):
            raise InputError('must be none, auto, required, or {"type": "function", …}', where="tool_choice")
        return call_schema(tools, name)

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
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true.", param="top_logprobs", code="invalid_value")
        given: dict[str, Any] = {name: getattr(self, name) for name in _SAME}
        given |= {
            "max_tokens": getattr(self, limit),
            "stop": _stops(self.stop),
            "logit_bias": _bias(self.logit_bias),
            "logprobs": (self.top_logprobs or 0) if self.logprobs else None,
            "reuse": "off" if self.cache_prompt is False else None,
            **self._constraint(),
        }
        try:
            return GenerationOptions(**{key: value for key, value in given.items() if value is not None})
        except InputError as error:
            param = limit if error.where == "max_tokens" else error.where
            raise ApiError(400, f"{param}: {error.what}.", param=param, code="invalid_value") from None

    def _constraint(self) -> dict[str, Any]:
        """The one constraint that is asked for, by the name of its option."""
        found = {
            "response_format": {"json_schema": _json_schema(self.response_format)},
            "structured_outputs": _structured(self.structured_outputs),
            "tool_choice": {"json_schema": self._forced(self.functions())},
        }
        asked = {
            param: option for param, option in found.items() if any(value is not None for value in option.values())
        }
        if len(asked) > 1:
            param = list(asked)[1]
            raise ApiError(
                400, f"{param} cannot be combined with {next(iter(asked))}.", param=param, code="invalid_value"
            )
        return next(iter(asked.values()), {})


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


def _bias(bias: dict[str, float] | None) -> dict[int, float] | None:
    if bias is None:
        return None
    if wrong := next((token for token in bias if not (token.isascii() and token.isdigit())), None):
        raise ApiError(400, f"logit_bias: {wrong!r} is no token id.", param="logit_bias", code="invalid_value")
    return {int(token): value for token, value in bias.items()}


def _structured(wanted: Any) -> dict[str, Any]:
    if wanted is None:
        return {}
    if not isinstance(wanted, dict) or len(wanted) != 1 or (kind := next(iter(wanted))) not in _CONSTRAINTS:
        raise ApiError(
            400,
            "structured_outputs must have one key: json, regex or grammar.",
            param="structured_outputs",
            code="invalid_value",
        )
    return {_CONSTRAINTS[kind]: wanted[kind]}


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
