"""How an answer is made: length, sampling, stops, constraints. Checked here, for the command line and the
service."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypedDict

from edgetune.errors import InputError, first_line
from edgetune.runtime import checks

# The KV cache is allocated for prompt and answer together, so an answer without a limit of its own gets this
# one.
DEFAULT_MAX_TOKENS = 512
MAX_SEED = 2**31 - 1  # ONNX Runtime GenAI keeps the seed in a 32-bit signed integer
MAX_STOPS = 16
MAX_LOGPROBS = 20
MAX_BIAS = 100.0


@dataclass(frozen=True)
class GenerationOptions:
    """What is asked of the model.

    The default temperature is 0: the likeliest token each time. It is what the gate measured, it gives the
    same answer to the same question, and small models lose the thread soon when they are sampled.

    How temperature, truncation, penalties and bias act together: `edgetune.runtime.sampling`.

    Attributes:
        max_tokens: most tokens of the answer; None: what the context has left, at most 512.
        temperature: 0 takes the likeliest token, higher values (up to 2) draw more evenly.
        top_p: with a temperature, draw from the likeliest tokens that together have this probability.
        top_k: with a temperature, draw from this many likeliest tokens; 0: from all.
        min_p: with a temperature, leave out tokens below this share of the likeliest one's probability.
        repetition_penalty: over 1, tokens of the prompt and the answer become less likely; 1: none.
        presence_penalty: taken off the logits of tokens that the answer has, -2 to 2.
        frequency_penalty: the same for each time that the answer has them, -2 to 2.
        logit_bias: added to logits, -100 to 100, by token id.
        seed: makes drawing repeatable, 0 to 2^31-1; None: different each time.
        stop: the answer ends before the first of these strings; any sequence of strings is kept as a tuple, None as
            an empty one. Not together with a constraint, which says itself where the answer ends.
        json_schema: the answer is a JSON text that fits this JSON Schema.
        regex: the answer as a whole fits this regular expression, in the syntax of Rust's regex.
        grammar: the answer fits this context-free grammar, in llguidance's dialect of Lark.
        logprobs: report the log-probability of each token of the answer and of this many likeliest ones, 0 to 20.
        prompt_logprobs: the same for the prompt. Nothing of it is reused then; where the graph gives logits of the
            last position only (`prune_lm_head`), it is read token by token, which is slow.
        reuse: what of an earlier prompt is not read again. `exact`: whole pieces (`runtime/prefix.py`) that
            begin both, so that the answer is bit for bit that of a fresh start; `fast`: all that begins both, the
            last answer included, whose rounding may differ; `off`: nothing.
        speculation: guess several tokens ahead from what stands in prompt and answer already, and read them at once,
            which rounds otherwise than one by one. `auto`: where `edgetune tune` measured what that costs, and as
            long as it pays; `on`: whenever there is something to guess; `off`: never. See `runtime/speculation.py`.
        exact: the tokens are those of a fresh start, decoded one by one, whatever `reuse` and `speculation` allow.
        adapter: of an artifact that carries adapters, the one that is on; `none`: the base; None: the artifact's
            only one, the base where it has several.

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
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    regex: str | None = None
    grammar: str | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    reuse: Literal["exact", "fast", "off"] = "exact"
    speculation: Literal["off", "auto", "on"] = "auto"
    exact: bool = False
    adapter: str | None = None

    def __post_init__(self) -> None:
        for name, low, high in _WHOLE:
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, checks.whole(name, value, low, high))
        if self.top_k is None:
            raise InputError("must be a whole number from 0, not None", where="top_k")
        for name, span, fits in _NUMBERS:
            object.__setattr__(self, name, checks.number(name, getattr(self, name), span, fits))
        object.__setattr__(self, "stop", _stops(self.stop))
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))
        checks.choice("reuse", self.reuse, ("exact", "fast", "off"))
        checks.choice("speculation", self.speculation, ("off", "auto", "on"))
        checks.flag("exact", self.exact)
        if self.adapter is not None:
            checks.text("adapter", self.adapter)
        if self.exact:
            object.__setattr__(self, "speculation", "off")
            object.__setattr__(self, "reuse", "exact" if self.reuse == "fast" else self.reuse)
        given = [name for name in ("json_schema", "regex", "grammar") if getattr(self, name) is not None]
        for name in given:
            if name == "json_schema":
                _check_schema(self.json_schema)
            elif not checks.text(name, getattr(self, name)):
                raise InputError("must be a string that is not empty", where=name)
        if len(given) > 1:
            raise InputError(f"cannot be combined with {given[0]}", where=given[1], fix="give one constraint")
        if given and self.stop:
            raise InputError(
                f"cannot be combined with {given[0]}: what is cut off would not fit it",
                where="stop",
                fix="leave the stop strings out; the constraint says where the answer ends",
            )

    @property
    def greedy(self) -> bool:
        """Whether each token is the likeliest one as the model says it, and nothing else is asked about it."""
        shaped = self.logit_bias or self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        return self.temperature == 0 and not shaped and self.logprobs is None


class OptionFields(TypedDict, total=False):
    """Fields of GenerationOptions as keywords."""

    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    stop: Sequence[str]
    json_schema: dict[str, Any] | None
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: dict[int, float]
    regex: str | None
    grammar: str | None
    logprobs: int | None
    prompt_logprobs: int | None
    reuse: Literal["exact", "fast", "off"]
    speculation: Literal["off", "auto", "on"]
    exact: bool
    adapter: str | None


def options_of(options: GenerationOptions | None, fields: OptionFields) -> GenerationOptions:
    """`options`, or the defaults, with `fields` in place of theirs. Raises InputError."""
    given: dict[str, Any] = {**fields}
    if unknown := given.keys() - OptionFields.__annotations__.keys():
        names = sorted(OptionFields.__annotations__)
        raise InputError(
            f"is no option: {', '.join(sorted(unknown))}", where="options", fix=f"there are {', '.join(names)}"
        )
    if options is not None and not isinstance(options, GenerationOptions):
        what = f"must be GenerationOptions, not {checks.shown(options)}"
        raise InputError(what, where="options", fix="give single options by name: max_tokens=64")
    return replace(options or GenerationOptions(), **given)


# Of each whole number: the least and the most.
_WHOLE: tuple[tuple[str, int, int | None], ...] = (
    ("max_tokens", 1, None),
    ("top_k", 0, None),
    ("seed", 0, MAX_SEED),
    ("logprobs", 0, MAX_LOGPROBS),
    ("prompt_logprobs", 0, MAX_LOGPROBS),
)
# Of each other number: which ones it may be.
_NUMBERS: tuple[tuple[str, str, Callable[[float], bool]], ...] = (
    ("temperature", "from 0 to 2", lambda value: 0 <= value <= 2),
    ("top_p", "over 0 and up to 1", lambda value: 0 < value <= 1),
    ("min_p", "from 0 to 1", lambda value: 0 <= value <= 1),
    ("repetition_penalty", "over 0 and up to 2", lambda value: 0 < value <= 2),
    ("presence_penalty", "from -2 to 2", lambda value: -2 <= value <= 2),
    ("frequency_penalty", "from -2 to 2", lambda value: -2 <= value <= 2),
)


def _stops(value: Any) -> tuple[str, ...]:
    found = [] if value is None else checks.items("stop", value, "a list of strings")
    if len(found) > MAX_STOPS:
        raise InputError(f"takes up to {MAX_STOPS} strings, not {len(found)}", where="stop")
    if not all(checks.text("stop", text) for text in found):
        raise InputError("must be strings, none of them empty", where="stop")
    return tuple(found)


def _bias(value: Any) -> dict[int, float]:
    where, found = "logit_bias", dict[int, float]()
    if not isinstance(value, dict):
        raise InputError("must give numbers by token id", where=where, fix="such as {50: -100}")
    for token, bias in value.items():
        try:
            known = checks.whole(where, token, 0)
        except InputError:
            what = f"{checks.shown(token)} is no token id"
            raise InputError(what, where=where, fix="`Session.encode` gives ids of a text") from None
        fits = f"from -{MAX_BIAS:g} to {MAX_BIAS:g}"
        found[known] = checks.number(where, bias, fits, lambda number: abs(number) <= MAX_BIAS)
    return found


def _check_schema(value: Any) -> None:
    if not isinstance(value, dict):
        raise InputError("must be a JSON object", where="json_schema", fix='such as {"type": "object"}')
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"cannot be written as JSON: {first_line(error)}", where="json_schema") from error
