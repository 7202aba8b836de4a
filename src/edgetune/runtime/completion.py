"""What goes into a session and what comes out of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, NotRequired, TypedDict


class Message(TypedDict):
    """One turn of a conversation; `role` is system, user, assistant or tool.

    An assistant's turn may carry `tool_calls` as OpenAI's API has them, a tool's turn `tool_call_id` and `name`. What a
    template makes of them is the model's business.
    """

    role: str
    content: str
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


@dataclass(frozen=True)
class TokenLogprob:
    """How likely a token was.

    Attributes:
        id: the token.
        text: its text; half a character is written as U+FFFD.
        bytes: its bytes, None for a special token, which stands for no text.
        logprob: natural logarithm of the probability that the model gave it, before penalties, bias, temperature,
            truncation and constraints.
        top: the likeliest tokens, best first, as many as were asked for; their own `top` is empty.
    """

    id: int
    text: str
    bytes: tuple[int, ...] | None
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class ToolCall:
    """A call that the model asks for.

    Attributes:
        name: the function.
        arguments: by name.
        raw: the text that says so, with its markers.
    """

    name: str
    arguments: dict[str, Any]
    raw: str


@dataclass(frozen=True)
class Completion:
    """A whole answer.

    Attributes:
        text: the answer, without stop string, special tokens and tool calls.
        ids: every token that was generated, the stop token included.
        finish_reason: `stop`: a stop token or string, or the constraint is fulfilled; `length`: max_tokens or the
            context is used up; `cancelled`.
        prompt_tokens: tokens of the prompt.
        completion_tokens: number of `ids`.
        ttft_s: seconds from the start of the work to the first token, None when there is none. Waiting for
            another generation does not count.
        decode_tokens_per_s: speed after the first token, None with fewer than two. What the reader of the
            stream does meanwhile does not count.
        cached_tokens: tokens of the prompt that were there from an earlier one, and were not read again.
        logprobs: of each token of `ids`, where asked for.
        prompt_logprobs: of each token of the prompt; the first has nothing before it and is None. Where asked for.
        tool_calls: the calls in the answer, where tools were given.
        drafted_tokens: tokens that were guessed ahead.
        accepted_tokens: those of them that were right.
        fits: whether the answer fits the constraint that was asked for: True when it ended with `stop`, False when it was
            cut (`length`, `cancelled`). None where there was no constraint.
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: Literal["stop", "length", "cancelled"]
    prompt_tokens: int
    completion_tokens: int
    ttft_s: float | None
    decode_tokens_per_s: float | None
    cached_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    fits: bool | None = None

    def describe(self) -> str:
        """The numbers in one line, for people."""
        cached = f" ({self.cached_tokens:,} of them known)" if self.cached_tokens else ""
        parts = [f"prompt {self.prompt_tokens:,} tokens{cached}", f"answer {self.completion_tokens:,} tokens"]
        if self.ttft_s is not None:
            parts.append(f"time to first token {self.ttft_s * 1e3:,.0f} ms")
        if self.decode_tokens_per_s is not None:
            parts.append(f"{self.decode_tokens_per_s:,.1f} tokens/s")
        if self.drafted_tokens:
            parts.append(f"{self.accepted_tokens:,} of {self.drafted_tokens:,} guessed tokens right")
        return ", ".join([*parts, f"ended by {self.finish_reason}"])

    def as_dict(self) -> dict[str, Any]:
        """For JSON: everything but the token ids; logprobs, tool calls and `fits` only where there are some."""
        left_out = {"ids"} | {key for key in ("logprobs", "prompt_logprobs", "tool_calls") if not getattr(self, key)}
        left_out |= {"fits"} if self.fits is None else set()
        return {key: value for key, value in asdict(self).items() if key not in left_out}


@dataclass(frozen=True)
class Piece:
    """A step of a stream: one a token, and a last one.

    Attributes:
        text: new text, whole characters only; may be empty.
        ids: the token, empty in the last piece.
        completion: the whole answer, in the last piece only.
        logprobs: of `ids`, where asked for.
    """

    text: str
    ids: tuple[int, ...]
    completion: Completion | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
