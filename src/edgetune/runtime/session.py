"""A loaded artifact: prompts in, answers out, one generation at a time."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypedDict

from edgetune.errors import EdgetuneError, InputError
from edgetune.runtime import genai
from edgetune.runtime.artifact import Artifact
from edgetune.runtime.hardware import checked_threads
from edgetune.runtime.options import DEFAULT_MAX_TOKENS, GenerationOptions
from edgetune.runtime.providers import named, register_genai, require
from edgetune.runtime.stops import StopFilter

_WAIT_S = 0.05  # how often a generation that waits for its turn looks at its cancel event
# JSON as json.dumps writes it. Without this, small models put in white space until the tokens run out.
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_GUIDED_FIX = "leave emoji and other characters of several tokens out of the JSON Schema's const, enum and pattern"
_NO_GRAMMAR = '{"type": "edgetune"}'  # no JSON Schema: a build that knows guidance refuses it


class Message(TypedDict):
    """One turn of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Completion:
    """A whole answer.

    Attributes:
        text: the answer, without stop string and special tokens.
        ids: every token that was generated, the stop token included.
        finish_reason: `stop`: a stop token or string, or the JSON is complete; `length`: max_tokens or the
            context is used up; `cancelled`.
        prompt_tokens: tokens of the prompt.
        completion_tokens: number of `ids`.
        ttft_s: seconds from the start of the work to the first token, None when there is none. Waiting for
            another generation does not count.
        decode_tokens_per_s: speed after the first token, None with fewer than two. What the reader of the
            stream does meanwhile does not count.
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: Literal["stop", "length", "cancelled"]
    prompt_tokens: int
    completion_tokens: int
    ttft_s: float | None
    decode_tokens_per_s: float | None

    def describe(self) -> str:
        """The numbers in one line, for people."""
        parts = [f"prompt {self.prompt_tokens:,} tokens", f"answer {self.completion_tokens:,} tokens"]
        if self.ttft_s is not None:
            parts.append(f"time to first token {self.ttft_s * 1e3:,.0f} ms")
        if self.decode_tokens_per_s is not None:
            parts.append(f"{self.decode_tokens_per_s:,.1f} tokens/s")
        return ", ".join([*parts, f"ended by {self.finish_reason}"])

    def as_dict(self) -> dict[str, Any]:
        """Everything but the token ids, for JSON."""
        return {key: value for key, value in asdict(self).items() if key != "ids"}


@dataclass(frozen=True)
class Piece:
    """A step of a stream: one a token, and a last one.

    Attributes:
        text: new text, whole characters only; may be empty.
        ids: the token, empty in the last piece.
        completion: the whole answer, in the last piece only.
    """

    text: str
    ids: tuple[int, ...]
    completion: Completion | None = None


class Session:
    """An artifact in memory. Thread-safe; a context manager.

    The user's text is not escaped: what looks like a special token (`<|im_end|>`) in a message is read as
    that token.

    Args:
        artifact: a verified artifact.
        threads: CPU threads; all cores when None.
        on_cpu: run it on the CPU, whatever provider it was exported for.

    Raises:
        InputError: `threads` is below 1, or far more than this machine has cores; the artifact needs an execution
            provider that is missing.
        EdgetuneError: ONNX Runtime cannot load the artifact, or its tokenizer, template or stop tokens are
            not what the model was trained with (golden.json).
    """

    def __init__(self, artifact: Artifact, threads: int | None = None, *, on_cpu: bool = False) -> None:
        threads = checked_threads(threads)
        provider = "cpu" if on_cpu else named(artifact.config)
        if provider != "cpu":
            require(provider, artifact.name)
        started = time.perf_counter()
        self.artifact, self.threads = artifact, threads
        self._lock = threading.Lock()
        self._guidance_works = False
        self._og = genai()
        register_genai(self._og, provider)
        settings = {"log_severity_level": 3, "intra_op_num_threads": self.threads}
        with _native("ONNX Runtime cannot load the artifact", artifact):
            config = self._og.Config(str(artifact.path))
            if on_cpu:
                config.clear_providers()
            config.overlay(json.dumps({"model": {"decoder": {"session_options": settings}}}))
            self._model: Any = self._og.Model(config)
            self._tokenizer: Any = self._og.Tokenizer(self._model)
        self._check_contract()
        self.load_s = time.perf_counter() - started

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model, once a generation that runs has ended. The session cannot be used afterwards."""
        with self._lock:
            self._model = self._tokenizer = None

    def render(self, messages: Sequence[Message]) -> str:
        """The text that the chat template makes of a conversation, up to where the assistant's answer begins.

        Raises:
            InputError: a message is malformed, or the template refuses the conversation.
        """
        for number, message in enumerate(messages, 1):
            if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
                raise InputError("needs role and content, both strings", where=f"message {number}")
            _check_text(message["content"])
        tokenizer = self._open()
        try:
            return str(tokenizer.apply_chat_template(json.dumps(list(messages)), add_generation_prompt=True))
        except RuntimeError as error:
            raise InputError(
                f"the model's chat template refuses this conversation: {_first_line(error)}",
                fix="some templates take no system turn, or want user and assistant in turns",
            ) from error

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; nothing is added in front or behind. Raises InputError for text that is not
        Unicode."""
        _check_text(text)
        return [int(token) for token in self._open().encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens. Bytes that are no UTF-8 are left out."""
        stream = self._open().create_stream()  # Tokenizer.decode ends at the first byte that is no UTF-8
        return "".join(stream.decode(int(token)) for token in ids)

    def stream(
        self,
        prompt: str | Sequence[Message],
        options: GenerationOptions | None = None,
        cancel: threading.Event | None = None,
    ) -> Iterator[Piece]:
        """Generate an answer, a piece a token.

        The prompt is checked at once; the work begins with the first piece. A generation that another one is
        ahead of waits for it. Close the iterator (`contextlib.closing`) or read it to its end: until then it
        holds the session, and a second generation of the same thread would wait for ever.

        Args:
            prompt: messages go through the chat template; a string is sent as it is.
            options: the defaults of GenerationOptions when None.
            cancel: set it from any thread, and the answer ends at the next token with reason `cancelled`.

        Raises:
            InputError: the prompt is empty or leaves no room in the context, or the JSON Schema cannot be
                followed.
            EdgetuneError: the runtime failed.
        """
        options = options or GenerationOptions()
        ids = self.encode(prompt if isinstance(prompt, str) else self.render(prompt))
        if not ids:
            raise InputError("the prompt is empty", fix="give some text")
        room = self.artifact.max_length - len(ids)
        if room < 1:
            raise InputError(
                f"the prompt has {len(ids):,} tokens; the context holds {self.artifact.max_length:,}, "
                "the answer's included",
                fix="shorten it, or export with a larger export.max_length",
            )
        return self._stream(ids, min(options.max_tokens or DEFAULT_MAX_TOKENS, room), options, cancel)

    def generate(
        self,
        prompt: str | Sequence[Message],
        options: GenerationOptions | None = None,
        cancel: threading.Event | None = None,
    ) -> Completion:
        """The whole answer; arguments and errors are those of `stream`."""
        found = None
        for piece in self.stream(prompt, options, cancel):
            found = piece.completion
        assert found is not None
        return found

    def _stream(
        self, ids: list[int], limit: int, options: GenerationOptions, cancel: threading.Event | None
    ) -> Iterator[Piece]:
        cancel = cancel or threading.Event()
        while not self._lock.acquire(timeout=_WAIT_S):
            if cancel.is_set():
                yield Piece("", (), Completion("", (), "cancelled", len(ids), 0, None, None))
                return
        try:
            yield from self._answer(ids, limit, options, cancel)
        finally:
            self._lock.release()

    def _answer(
        self, ids: list[int], limit: int, options: GenerationOptions, cancel: threading.Event
    ) -> Iterator[Piece]:
        started = time.perf_counter()
        generator = self._begin(ids, limit, options, cancel)
        decoder, stops = self._open().create_stream(), StopFilter(options.stop)
        made: list[int] = []
        text: list[str] = []
        ttft, decode_s = None, 0.0
        reason: Literal["stop", "length", "cancelled"] | None = None
        while reason is None:
            if cancel.is_set():
                reason = "cancelled"
                break
            before = time.perf_counter()
            with _native("the generation failed", self.artifact, _GUIDED_FIX if options.json_schema else None):
                generator.generate_next_token()
                token = int(generator.get_next_tokens()[0])
                ended = generator.is_done()
            now = time.perf_counter()
            if ttft is None:
                ttft = now - started
            else:
                decode_s += now - before
            made.append(token)
            text.append(stops.feed(decoder.decode(token)))
            if stops.found or token in self.artifact.stop_ids:
                reason = "stop"
            elif ended:  # without a stop token: the tokens are used up, or the grammar has nothing to add
                reason = "length" if len(made) >= limit else "stop"
            yield Piece(text[-1], (token,))
        text.append(stops.rest())
        if options.json_schema is not None and reason == "stop" and not stops.found:
            self._check_json("".join(text))
        speed = (len(made) - 1) / decode_s if decode_s > 0 else None
        answer = Completion("".join(text), tuple(made), reason, len(ids), len(made), ttft, speed)
        yield Piece(text[-1], (), answer)

    def _begin(self, ids: list[int], limit: int, options: GenerationOptions, cancel: threading.Event) -> Any:
        """A native generator that has read the prompt. Keeping common prefixes will find its place here."""
        # Graphs of fixed shapes write a whole KV cache, whatever is asked for: a smaller one would be overrun.
        fixed = "sliding_window" in self.artifact.config["model"]["decoder"]
        length = self.artifact.max_length if fixed else len(ids) + limit
        search: dict[str, Any] = {"max_length": length, "do_sample": options.temperature > 0}
        if options.temperature > 0:
            search |= {"temperature": options.temperature, "top_p": options.top_p}
            search["top_k"] = min(options.top_k, int(self.artifact.config["model"]["vocab_size"]))
            if options.seed is not None:
                search["random_seed"] = options.seed
        self._open()
        with _native("the generation failed", self.artifact):
            params = self._og.GeneratorParams(self._model)
            params.set_search_options(**search)
        if options.json_schema is None:
            with _native("the generation failed", self.artifact):
                generator = self._og.Generator(self._model, params)
        else:
            generator = self._guided(params, options.json_schema)
        with _native("the generation failed", self.artifact):
            size = self.artifact.prefill_tokens
            for start in range(0, len(ids), size):
                if cancel.is_set():
                    break
                generator.append_tokens(ids[start : start + size])
        return generator

    def _guided(self, params: Any, schema: dict[str, Any]) -> Any:
        """A generator whose answers fit the schema. Raises InputError where that cannot be done."""
        if not self._guidance_works:
            probe = self._og.GeneratorParams(self._model)
            probe.set_search_options(max_length=2)
            with contextlib.suppress(RuntimeError):
                probe.set_guidance("json_schema", _NO_GRAMMAR)
                self._og.Generator(self._model, probe)
                # A build without guidance only logs that it is missing, and would answer as it likes.
                raise EdgetuneError(
                    "this build of onnxruntime-genai cannot follow a JSON Schema",
                    fix="`pip install --force-reinstall onnxruntime-genai`, or no schema",
                )
            self._guidance_works = True
        try:
            params.set_guidance("json_schema", json.dumps({"x-guidance": _JSON_STYLE, **schema}))
            return self._og.Generator(self._model, params)
        except RuntimeError as error:
            raise InputError(
                f"the schema cannot be followed: {' '.join(str(error).split())[:300]}",
                where="json_schema",
                fix="check it; not every JSON Schema keyword is supported",
            ) from error

    def _check_json(self, text: str) -> None:
        """The grammar does not see inside characters of several tokens; a broken one may swallow a quote."""
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            raise EdgetuneError(
                f"the model wrote a broken character, so its JSON is not whole ({error})",
                where=self.artifact.path,
                fix="ask again, with a lower temperature or another seed",
            ) from error

    def _open(self) -> Any:
        if self._tokenizer is None:
            raise EdgetuneError("the session is closed")
        return self._tokenizer

    def _check_contract(self) -> None:
        """Compare template, tokenizer and stop tokens with what the model was trained with."""
        golden = self.artifact.golden
        fix = "export it again; if it stays so, this runtime reads the tokenizer or the template differently"
        where = self.artifact.path / "golden.json"
        if set(golden["stop_ids"]) != set(self.artifact.stop_ids):
            raise EdgetuneError(
                f"stop tokens are {list(self.artifact.stop_ids)}, not {golden['stop_ids']} as in training",
                where=where,
                fix=fix,
            )
        for number, prompt in enumerate(golden["prompts"], 1):
            text = self.render(prompt["messages"])
            ids = self.encode(text)
            for what, found, wanted in (
                ("the chat template gives another text", text, prompt["text"]),
                ("the tokenizer gives other ids", ids, prompt["ids"]),
            ):
                if found != wanted:
                    raise EdgetuneError(
                        f"golden prompt {number}: {what} {_difference(found, wanted)}", where=where, fix=fix
                    )


@contextlib.contextmanager
def _native(what: str, artifact: Artifact, fix: str | None = None) -> Iterator[None]:
    """The runtime's errors, which are all RuntimeError, as ours."""
    try:
        yield
    except RuntimeError as error:
        raise EdgetuneError(f"{what}: {_first_line(error)}", where=artifact.path, fix=fix) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _check_text(text: str) -> None:
    if "\0" in text:  # the native side would take it for the end
        raise InputError("the text holds a NUL character", fix="give text, not a binary file")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"the text is not Unicode ({error.reason} at {error.start})", fix="give UTF-8 text") from error


def _difference(found: Sequence[Any], wanted: Sequence[Any]) -> str:
    """Where two sequences part, and what stands there."""
    at = next(
        (i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b),
        min(len(found), len(wanted)),
    )
    return f"from place {at}: {found[at : at + 12]!r}, not {wanted[at : at + 12]!r}"
