"""Sequence-to-sequence models: a text in, another text out, the likeliest token each time."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Generator, Sequence
from typing import Any, Literal, Unpack

import numpy as np
from numpy.typing import NDArray

from edgetune.errors import InputError
from edgetune.runtime import checks
from edgetune.runtime.cancel import Cancel
from edgetune.runtime.capi import Interrupted
from edgetune.runtime.completion import Completion, Piece
from edgetune.runtime.options import DEFAULT_MAX_TOKENS, GenerationOptions, OptionFields, options_of
from edgetune.runtime.plain.artifact import PlainArtifact
from edgetune.runtime.plain.description import DECODER_GRAPH, ENCODER_GRAPH
from edgetune.runtime.plain.graph import Graph, interruptible, value_of
from edgetune.runtime.plain.tokens import Tokens
from edgetune.runtime.stops import StopFilter

_FOLLOWED = ("max_tokens", "stop", "exact", "reuse", "speculation")  # the last three allow what is not done here
_MOST_IDS = 2**31  # the graph itself refuses those that are none of its own


class Seq2Seq:
    """A sequence-to-sequence model in memory. A context manager; several threads may use it at once.

    The text is sent as it is, with what the tokenizer adds. Answers are greedy, and the same each time.

    Args:
        artifact: verified.
        threads: CPU threads; all cores when None.

    Raises:
        InputError: `threads` is below 1, or far more than this machine has cores.
        EdgetuneError: ONNX Runtime cannot load it, or its tokenizer is not the model's.
    """

    def __init__(self, artifact: PlainArtifact, threads: int | None = None) -> None:
        self.artifact = artifact
        started = time.perf_counter()
        self._tokens = Tokens(artifact)
        self._encoder = Graph(artifact.path / ENCODER_GRAPH, threads)
        self._decoder = Graph(artifact.path / DECODER_GRAPH, threads)
        self._past = [name for name in self._decoder.inputs if name.startswith("past.")]
        self.load_s = time.perf_counter() - started

    def __enter__(self) -> Seq2Seq:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model, once what runs has ended. It cannot be used afterwards."""
        self._encoder.close()
        self._decoder.close()

    def encode(self, text: str) -> list[int]:
        """The token ids that the model reads of a text.

        Raises:
            InputError: it is not Unicode, empty, or over-long.
        """
        if not checks.text("text", text).strip():
            raise InputError("the prompt is empty", fix="give some text")
        return list(self._tokens.windows([text], "refuse")[0].encoding.ids)

    def stream(
        self,
        text: str,
        options: GenerationOptions | None = None,
        cancel: threading.Event | None = None,
        **fields: Unpack[OptionFields],
    ) -> Generator[Piece]:
        """Generate an answer, a piece a token. The text is checked at once, the work begins with the first piece.

        Args:
            text: what the model reads.
            options: of which `max_tokens` (512 at most when None, and never more than the model writes) and `stop` are
                followed.
            cancel: set it from any thread, and the answer ends at once with reason `cancelled`.
            fields: of GenerationOptions (`max_tokens=64`), in place of those of `options`.

        Raises:
            InputError: the text is empty or over-long, or the options ask for what such a model does not do here.
            EdgetuneError: closed, or the runtime failed.
        """
        checks.event("cancel", cancel)
        options = options_of(options, fields)
        plain = GenerationOptions(exact=options.exact)
        asked = [
            name for name in vars(plain) if name not in _FOLLOWED and getattr(options, name) != getattr(plain, name)
        ]
        asked += ["speculation"] if options.speculation == "on" else []
        if asked:
            raise InputError(
                f"a sequence-to-sequence model answers greedily: {', '.join(asked)} cannot be followed",
                where=self.artifact.name,
                fix=f"leave {'it' if len(asked) == 1 else 'them'} out",
            )
        limit = min(options.max_tokens or DEFAULT_MAX_TOKENS, self.artifact.description.max_answer)
        return self._answer(self.encode(text), limit, options.stop, cancel)

    def generate(
        self,
        text: str,
        options: GenerationOptions | None = None,
        cancel: threading.Event | None = None,
        **fields: Unpack[OptionFields],
    ) -> Completion:
        """The whole answer; see `stream`."""
        completion = None
        for piece in self.stream(text, options, cancel, **fields):
            completion = piece.completion
        assert completion is not None
        return completion

    def logits(self, ids: Sequence[int], answer: Sequence[int]) -> NDArray[np.float32]:
        """What the model gives for each token of an answer and the one after it, read at once.

        Args:
            ids: the text's tokens, as `encode` gives them.
            answer: any tokens.

        Returns:
            (tokens of the answer + 1, vocabulary) float32: row i is what token i is chosen by.
        """
        given = [checks.token_ids(name, value, _MOST_IDS) for name, value in (("ids", ids), ("answer", answer))]
        state = self._read(given[0])
        rows: NDArray[np.float32] = self._step(state, [self.artifact.description.start_id, *given[1]])
        return rows

    def choose(self, logits: NDArray[np.float32], place: int) -> int:
        """The token to take: the likeliest, but for those that never come, and one that must come first.

        Args:
            logits: (vocabulary,); changed.
            place: of the token in the answer.
        """
        description = self.artifact.description
        if place == 0 and description.first_id is not None:
            return description.first_id
        if description.suppressed:
            logits[list(description.suppressed)] = -np.inf
        return int(logits.argmax())

    def _answer(self, ids: list[int], limit: int, stops: Sequence[str], cancel: Cancel | None) -> Generator[Piece]:
        started, decoder, words = time.perf_counter(), self._tokens.stream(), StopFilter(stops)
        made: list[int] = []
        text: list[str] = []
        reason: Literal["stop", "length", "cancelled"] = "cancelled"
        ttft_s, decode_s = None, 0.0
        token = self.artifact.description.start_id
        given_up = threading.Event() if cancel is None else cancel
        with contextlib.suppress(Interrupted), interruptible(cancel) as how:
            state = {} if given_up.is_set() else self._read(ids, how)
            while reason == "cancelled" and not given_up.is_set():
                before = time.perf_counter()
                token = self.choose(self._step(state, [token], how)[-1].copy(), len(made))
                now = time.perf_counter()
                if ttft_s is None:
                    ttft_s = now - started
                else:
                    decode_s += now - before
                made.append(token)
                text.append(words.feed(decoder.feed(token)))
                if words.found or token in self.artifact.description.stop_ids:
                    reason = "stop"
                elif len(made) >= limit:
                    reason = "length"
                yield Piece(text[-1], (token,))
        text.append(words.rest())
        speed = (len(made) - 1) / decode_s if decode_s > 0 else None
        yield Piece(text[-1], (), Completion("".join(text), tuple(made), reason, len(ids), len(made), ttft_s, speed))

    def _read(self, ids: Sequence[int], how: Any = None) -> dict[str, Any]:
        """What the decoder needs of a text: its mask, and each layer's keys and values; and that nothing is written yet."""
        array = np.array([ids], np.int64)
        mask = value_of(np.ones_like(array))
        cross = self._encoder.run_values({"input_ids": value_of(array), "attention_mask": mask}, how)
        state = {"attention_mask": mask, **dict(zip(self._encoder.outputs, cross, strict=True))}
        for name in self._past:
            _, heads, _, size = self._decoder.inputs[name]
            state[name] = value_of(np.zeros((1, heads, 0, size), np.float32))
        return state

    def _step(self, state: dict[str, Any], tokens: Sequence[int], how: Any = None) -> NDArray[np.float32]:
        """Let the decoder read tokens; returns the logits (tokens, vocabulary) after each. `state` knows them then."""
        read = value_of(np.array([tokens], np.int64))
        logits, *present = self._decoder.run_values({**state, "input_ids": read}, how)
        state.update(zip(self._past, present, strict=True))
        return logits.numpy()[0]
