"""One answer: the loop over its tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from edgetune.runtime.artifact import Artifact
from edgetune.runtime.cancel import Cancel
from edgetune.runtime.capi import Interrupted
from edgetune.runtime.completion import Completion, Piece, TokenLogprob, ToolCall
from edgetune.runtime.guidance import Guide, constraints
from edgetune.runtime.native import native
from edgetune.runtime.options import GenerationOptions
from edgetune.runtime.prefix import FAILED, Context, OnPrefill, Reader
from edgetune.runtime.speculation import DEFAULT_COSTS, Counts, Policy, guessing, row_reader
from edgetune.runtime.stops import StopFilter
from edgetune.runtime.tools import MARKS, ToolFilter
from edgetune.runtime.vocabulary import Vocabulary


@dataclass(frozen=True)
class Step:
    """What the model gave in one go.

    Attributes:
        ids: one or several tokens.
        logprobs: of each, where asked for.
        ended: the native side has nothing to add.
    """

    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    ended: bool = False


@dataclass(frozen=True)
class Request:
    """What an answer is made from.

    Attributes:
        ids: the prompt's tokens, at least one.
        limit: most tokens of the answer, which have room in the context.
        options: how.
        cancel: ends it at once.
        on_prefill: told how many tokens of the prompt are read, and how many there are.
        tools: names of the functions whose calls are read from the answer.
        adapter: the one that is on.
        lasting: how many of the first tokens other prompts will begin with.
    """

    ids: list[int]
    limit: int
    options: GenerationOptions
    cancel: Cancel
    on_prefill: OnPrefill | None = None
    tools: tuple[str, ...] = ()
    adapter: str | None = None
    lasting: int = 0

    @property
    def names_tokens(self) -> bool:
        """Whether it needs to know what single tokens stand for."""
        named = (self.options.logprobs, self.options.prompt_logprobs, *constraints(self.options).values())
        return bool(self.tools) or any(one is not None for one in named)


def cancelled(request: Request) -> Piece:
    """The whole stream of an answer that was given up before it began."""
    return Piece("", (), Completion("", (), "cancelled", len(request.ids), 0, None, None))


@dataclass
class _Made:
    """What there is of an answer."""

    started: float
    ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reason: Literal["stop", "length", "cancelled"] = "cancelled"  # unless something else ends it
    ttft_s: float | None = None
    decode_s: float = 0.0

    def timed(self, before: float) -> None:
        """A step that began at `before` has ended."""
        now = time.perf_counter()
        if self.ttft_s is None:
            self.ttft_s = now - self.started
        else:
            self.decode_s += now - before

    def speed(self) -> float | None:
        return (len(self.ids) - 1) / self.decode_s if self.decode_s > 0 else None


class _Words:
    """From tokens to what may be shown: whole characters, up to a stop string, without calls of tools.

    Attributes:
        said: all up to a stop string, calls as they were written.
    """

    def __init__(self, decoder: Any, vocabulary: Vocabulary | None, request: Request) -> None:
        self._decoder = decoder
        self.stops, self.said = StopFilter(request.options.stop), ""
        self._tools = ToolFilter(request.tools) if request.tools else None
        # Marks around calls are special tokens in some models, which the decoder leaves out.
        added = vocabulary.added if vocabulary and request.tools else {}
        self._marks = {token: text for token, text in added.items() if text in MARKS}

    def feed(self, token: int) -> str:
        text = self.stops.feed(self._marks.get(token) or self._decoder.decode(token))
        self.said += text
        return self._tools.feed(text) if self._tools else text

    def rest(self) -> tuple[str, tuple[ToolCall, ...]]:
        """What was held, when there are no more tokens; and the calls."""
        text = self.stops.rest()
        self.said += text
        if self._tools is None:
            return text, ()
        shown = self._tools.feed(text)
        left, calls = self._tools.rest()
        return shown + left, calls


class Answer:
    """Answers one request.

    Args:
        reader: reads the prompt.
        artifact: what the model was loaded from.
        decoder: a native stream from tokens to text.
        vocabulary: what tokens stand for; None where the request needs none.
        request: what is asked for.
        row_costs: what reading several tokens at once takes, in steps, where that was measured.
    """

    def __init__(
        self,
        reader: Reader,
        artifact: Artifact,
        decoder: Any,
        vocabulary: Vocabulary | None,
        request: Request,
        row_costs: dict[int, float] | None = None,
    ) -> None:
        self._reader, self._artifact, self._vocabulary = reader, artifact, vocabulary
        self._row_costs, self._counts = row_costs, Counts()
        self._words = _Words(decoder, vocabulary, request)
        self._request, self._options = request, request.options
        self._guide = Guide.of(request.options)

    def pieces(self) -> Iterator[Piece]:
        """The stream. The context is kept for the next prompt when it is read to its end or closed."""
        made = _Made(time.perf_counter())
        request = self._request
        asked = (request.ids, request.limit, self._guide, self._reuse(), request.adapter, request.lasting)
        context = self._reader.begin(*asked)
        prompt_logprobs = None
        try:
            with context.interruptible(request.cancel):
                prompt_logprobs = self._read(context)
                yield from self._written(context, made)
        except Interrupted:
            pass
        except GeneratorExit:
            self._keep(context, made)
            raise
        rest, calls = self._words.rest()
        made.text.append(rest)
        self._keep(context, made)
        fits = None if self._guide is None else made.reason == "stop"
        if self._guide is not None and fits:
            self._guide.check(self._words.said, self._bytes(made.ids), self._artifact)
        counts = (len(self._request.ids), len(made.ids), made.ttft_s, made.speed(), context.cached)
        logprobs = tuple(made.logprobs) if self._options.logprobs is not None else None
        text = "".join(made.text)
        guessed = (self._counts.drafted, self._counts.accepted)
        done = Completion(text, tuple(made.ids), made.reason, *counts, logprobs, prompt_logprobs, calls, *guessed, fits)
        yield Piece(rest, (), done)

    def _bytes(self, ids: list[int]) -> bytes:
        """The bytes of tokens; special ones have none."""
        assert self._vocabulary is not None
        return b"".join(self._vocabulary.bytes(token) or b"" for token in ids)

    def _written(self, context: Context, made: _Made) -> Iterator[Piece]:
        """The pieces up to where the answer ends."""
        steps = self._steps(context)
        while not self._request.cancel.is_set():
            before = time.perf_counter()
            step = next(steps)
            made.timed(before)
            for place, token in enumerate(step.ids):
                found = step.logprobs[place : place + 1]
                made.ids.append(token)
                made.logprobs += found
                made.text.append(self._words.feed(token))
                ended = step.ended and place == len(step.ids) - 1  # the constraint has nothing to add
                if self._words.stops.found or token in self._artifact.stop_ids:
                    made.reason = "stop"
                elif len(made.ids) >= self._request.limit:
                    made.reason = "length"
                elif ended:
                    made.reason = "stop"
                yield Piece(made.text[-1], (token,), None, found)
                if made.reason != "cancelled" or self._request.cancel.is_set():
                    return

    def _reuse(self) -> str:
        return self._options.reuse if self._options.prompt_logprobs is None else "off"

    def _keep(self, context: Context, made: _Made) -> None:
        context.ids += made.ids[:-1]  # the last one was not read yet
        self._reader.keep(context)

    def _read(self, context: Context) -> tuple[TokenLogprob | None, ...] | None:
        """Read the prompt; returns its tokens' log-probabilities, where asked for."""
        ids, cancel, on_prefill = self._request.ids, self._request.cancel, self._request.on_prefill
        if (count := self._options.prompt_logprobs) is None:
            self._reader.read(context, ids, cancel, on_prefill)
            return None
        from edgetune.runtime.sampling import log_softmax

        found: list[TokenLogprob | None] = [None]
        for start, logits in self._reader.logits(context, ids, cancel, on_prefill):
            for place, row in enumerate(log_softmax(logits), start + 1):
                if place < len(ids):
                    found.append(self._logprob(row, ids[place], count))
        return None if len(found) < len(ids) else tuple(found)

    def _steps(self, context: Context) -> Iterator[Step]:
        """The answer's tokens, without an end: who reads them knows when it is enough."""
        if (guesses := self._guessing(context)) is not None:
            while True:
                with native(FAILED, self._artifact):
                    ids = next(guesses)
                yield Step(ids)
        sampler = None
        if not self._options.greedy:  # numpy is imported for it
            from edgetune.runtime.sampling import Sampler, log_softmax

            sampler = Sampler(self._options, self._request.ids)
        generator, fix = context.generator, self._guide.cure if self._guide else None
        while True:
            with native(FAILED, self._artifact, fix):
                row = None
                if sampler is not None:
                    logits = generator.get_logits()
                    flat = logits.reshape(-1)
                    row = log_softmax(flat) if self._options.logprobs is not None else None
                    generator.set_logits(sampler.scores(flat).reshape(logits.shape))
                generator.generate_next_token()
                token = int(generator.get_next_tokens()[0])
                ended = generator.is_done()
            if sampler is not None:
                sampler.took(token)
            logprobs = () if row is None else (self._logprob(row, token, self._options.logprobs or 0),)
            yield Step((token,), logprobs, ended)

    def _guessing(self, context: Context) -> Iterator[tuple[int, ...]] | None:
        """The answer's tokens, guessed ahead; None where that is not wanted, or not possible."""
        mode, generator = self._options.speculation, context.generator
        if mode == "off" or (mode == "auto" and self._row_costs is None):
            return None
        if not self._options.greedy or self._guide is not None or self._reader.fixed:
            return None
        with native(FAILED, self._artifact):
            read = row_reader(generator, self._artifact)
            if read is None:
                return None
            first = int(generator.get_logits().argmax())
        policy = Policy(self._row_costs or DEFAULT_COSTS, always=mode == "on")
        limit, counts = self._request.limit, self._counts
        return guessing(read, generator.rewind_to, self._request.ids, first, policy, limit, counts)

    def _logprob(self, row: Any, token: int, count: int) -> TokenLogprob:
        from edgetune.runtime.sampling import likeliest

        top = tuple(self._named(row, other) for other in likeliest(row, count))
        return self._named(row, token, top)

    def _named(self, row: Any, token: int, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        assert self._vocabulary is not None
        data = self._vocabulary.bytes(token)
        text = self._vocabulary.text(token)
        return TokenLogprob(token, text, None if data is None else tuple(data), float(row[token]), top)
