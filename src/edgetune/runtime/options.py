"""How an answer is made: length, sampling, stops, JSON Schema. Checked here, for the command line and the
service."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from edgetune.errors import InputError

# The KV cache is allocated for prompt and answer together, so an answer without a limit of its own gets this
# one.
DEFAULT_MAX_TOKENS = 512
MAX_SEED = 2**31 - 1  # ONNX Runtime GenAI keeps the seed in a 32-bit signed integer
MAX_STOPS = 16


@dataclass(frozen=True)
class GenerationOptions:
    """What is asked of the model.

    The default temperature is 0: the likeliest token each time. It is what the gate measured, it gives the
    same answer to the same question, and small models lose the thread soon when they are sampled.

    Attributes:
        max_tokens: most tokens of the answer; None: what the context has left, at most 512.
        temperature: 0 takes the likeliest token, higher values (up to 2) draw more evenly.
        top_p: with a temperature, draw from the likeliest tokens that together have this probability.
        top_k: with a temperature, draw from this many likeliest tokens; 0: from all.
        seed: makes drawing repeatable, 0 to 2^31-1; None: different each time.
        stop: the answer ends before the first of these strings; any sequence of strings is kept as a tuple.
        json_schema: the answer is a JSON text that fits this JSON Schema.

    Raises:
        InputError: a value is out of range; `where` is the option's name.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 50
    seed: int | None = None
    stop: tuple[str, ...] = ()
    json_schema: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        _whole("max_tokens", self.max_tokens, 1, None)
        _number("temperature", self.temperature, "from 0 to 2", lambda value: 0 <= value <= 2)
        _number("top_p", self.top_p, "over 0 and up to 1", lambda value: 0 < value <= 1)
        if self.top_k is None:
            raise InputError("must be a whole number from 0, not None", where="top_k")
        _whole("top_k", self.top_k, 0, None)
        _whole("seed", self.seed, 0, MAX_SEED)
        object.__setattr__(self, "stop", _stops(self.stop))
        if self.json_schema is not None and not isinstance(self.json_schema, dict):
            raise InputError("must be a JSON object", where="json_schema", fix='such as {"type": "object"}')


def _whole(name: str, value: Any, low: int, high: int | None) -> None:
    if value is None:
        return
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= low
    if not fits or (high is not None and value > high):
        span = f"from {low}" if high is None else f"from {low} to {high}"
        raise InputError(f"must be a whole number {span}, not {value!r}", where=name)


def _number(name: str, value: Any, span: str, fits: Any) -> None:
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not known or not fits(value):
        raise InputError(f"must be a number {span}, not {value!r}", where=name)


def _stops(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not all(isinstance(text, str) and text for text in value):
        raise InputError("must be strings, none of them empty", where="stop")
    if len(value) > MAX_STOPS:
        raise InputError(f"takes up to {MAX_STOPS} strings, not {len(value)}", where="stop")
    return tuple(value)
