"""What the service sends: answers whole and in pieces, usage, models."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgetune.runtime.completion import Completion, TokenLogprob, ToolCall


def usage(done: Completion) -> dict[str, Any]:
    """The `usage` object of an answer."""
    return {
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.completion_tokens,
        "total_tokens": done.prompt_tokens + done.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": done.cached_tokens},
        "completion_tokens_details": {
            "accepted_prediction_tokens": done.accepted_tokens,
            "rejected_prediction_tokens": done.drafted_tokens - done.accepted_tokens,
        },
    }


class Reply:
    """Makes the JSON objects of one answer: they share an id and a time.

    Args:
        model: the model's name.
        include_usage: whether streamed pieces carry `usage`, null in all but the last.
        one_call: whether only the first tool call is sent (`parallel_tool_calls` is false).
    """

    def __init__(self, model: str, include_usage: bool = False, one_call: bool = False) -> None:
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._usage = {"usage": None} if include_usage else {}
        self._one_call = one_call

    def whole(self, text: str, done: Completion) -> dict[str, Any]:
        """The answer in one piece (`chat.completion`)."""
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls := self._calls(done.tool_calls):
            message |= {"content": text or None, "tool_calls": calls}
        logprobs = None if done.logprobs is None else _logprobs(done.logprobs)
        choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": _finish(done)}
        found = {**self._head, "object": "chat.completion", "choices": [choice], "usage": usage(done)}
        if done.prompt_logprobs is not None:
            found["prompt_logprobs"] = [entry and _ranked(entry) for entry in done.prompt_logprobs]
        return found

    def chunk(
        self, delta: dict[str, Any], finish_reason: str | None = None, logprobs: Sequence[TokenLogprob] = ()
    ) -> dict[str, Any]:
        """One streamed piece (`chat.completion.chunk`)."""
        said = _logprobs(logprobs) if logprobs else None
        choice = {"index": 0, "delta": delta, "logprobs": said, "finish_reason": finish_reason}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice], **self._usage}

    def last_chunks(self, done: Completion) -> list[dict[str, Any]]:
        """What follows the text: tool calls, each of them whole, and why the answer ended."""
        calls = [{"index": place, **call} for place, call in enumerate(self._calls(done.tool_calls))]
        return [*([self.chunk({"tool_calls": calls})] if calls else []), self.chunk({}, _finish(done))]

    def usage_chunk(self, done: Completion) -> dict[str, Any]:
        """The last streamed piece where `stream_options.include_usage` was set: no choice, only the count."""
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage(done)}

    def _calls(self, calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
        return [
            {
                "id": uuid.uuid4().hex[:9],  # Mistral's templates take no longer ones, and letters and digits only
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
            }
            for call in (calls[:1] if self._one_call else calls)
        ]


def _finish(done: Completion) -> str:
    return "tool_calls" if done.tool_calls and done.finish_reason == "stop" else done.finish_reason


def _logprobs(entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    content = [{**_logprob(entry), "top_logprobs": [_logprob(top) for top in entry.top]} for entry in entries]
    return {"content": content, "refusal": None}


def _logprob(entry: TokenLogprob) -> dict[str, Any]:
    data = None if entry.bytes is None else list(entry.bytes)
    return {"token": entry.text, "logprob": entry.logprob, "bytes": data}


def _ranked(entry: TokenLogprob) -> dict[str, Any]:
    """A token of the prompt and the likeliest ones in its place, by id, as vLLM writes them."""
    ranks = {top.id: rank for rank, top in enumerate(entry.top, 1)}
    return {
        str(token.id): {"logprob": token.logprob, "rank": ranks.get(token.id), "decoded_token": token.text}
        for token in (entry, *entry.top)
    }


def model_object(model: str, created: int, name: str) -> dict[str, Any]:
    """An entry of `/v1/models`; that of an adapter names the artifact `name` as its parent, as vLLM does."""
    parent = {} if model == name else {"parent": name}
    return {"id": model, "object": "model", "created": created, "owned_by": "edgetune", **parent}
