"""A loaded artifact: prompts in, answers out, one generation at a time."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Generator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack

from edgetune.errors import EdgetuneError, InputError
from edgetune.runtime import checks
from edgetune.runtime.answer import Answer, Request, cancelled
from edgetune.runtime.artifact import Artifact
from edgetune.runtime.cancel import Cancel, Either
from edgetune.runtime.capi import Interrupted
from edgetune.runtime.completion import Completion, Message, Piece, TokenLogprob, ToolCall
from edgetune.runtime.model import load_model
from edgetune.runtime.options import DEFAULT_MAX_TOKENS, GenerationOptions, OptionFields, options_of
from edgetune.runtime.prefix import OnPrefill, Reader
from edgetune.runtime.profile import settings_for
from edgetune.runtime.prompt_cache import GRAPH, PromptCache, require
from edgetune.runtime.providers import named
from edgetune.runtime.templates import Template
from edgetune.runtime.tools import checked_tools
from edgetune.runtime.vocabulary import Vocabulary

__all__ = ["Completion", "Message", "Piece", "Session", "TokenLogprob", "ToolCall"]

_WAIT_S = 0.05  # how often a generation that waits for its turn looks at its cancel event
# How long a stream may rest that the waiting thread itself read last: another thread may be about to read it on.
_REST_S = 2.0


class Session:
    """An artifact in memory. Thread-safe; a context manager.

    The user's text is not escaped: what looks like a special token (`<|im_end|>`) in a message is read as
    that token.

    Args:
        artifact: a verified artifact.
        threads: CPU threads; as the device profile has them when None, or all cores where there is none.
        use_profile: run it with the settings that `edgetune tune` measured on this machine, where it did.
        on_cpu: run it on the CPU, whatever provider it was exported for.
        prompt_cache: keep what conversations begin with, their system prompt and tools, and what `read` is given, on
            disk, and take it up from there instead of reading it: in this folder, or in edgetune's own when True.

    Raises:
        InputError: `threads` is below 1, or far more than this machine has cores; the artifact needs an execution
            provider that is missing, or cannot take up what was kept.
        EdgetuneError: ONNX Runtime cannot load the artifact, or its tokenizer, template or stop tokens are
            not what the model was trained with (golden.json).
    """

    def __init__(
        self,
        artifact: Artifact,
        threads: int | None = None,
        *,
        use_profile: bool = True,
        on_cpu: bool = False,
        prompt_cache: Path | bool = False,
    ) -> None:
        if prompt_cache:
            require(artifact, "cpu" if on_cpu else named(artifact.config))
        self.artifact, self.settings = artifact, settings_for(artifact, threads, use_profile)
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._held: weakref.ref[Any] | None = None  # the stream that has the lock
        self._holder = 0  # the thread that read it last
        started = time.perf_counter()
        piece = self.settings.prefill_tokens or artifact.prefill_tokens
        self._cache = None
        if prompt_cache:
            folder = None if prompt_cache is True else prompt_cache
            self._cache = PromptCache(artifact, self.settings, piece, folder)
        loaded = load_model(artifact, self.settings, "cpu" if on_cpu else None, GRAPH if self._cache else None)
        self._model, self._tokenizer = loaded.model, loaded.tokenizer
        self._reader = Reader(loaded.og, loaded.model, artifact, piece, self._cache)
        self._template = Template(artifact, self._tokenizer)
        self._check_contract()
        self.load_s = time.perf_counter() - started

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model. The session cannot be used afterwards; closing it again does nothing.

        An answer that is being made in another thread ends with reason `cancelled`; a stream that nobody reads on ends.
        """
        self._closing.set()
        while not self._lock.acquire(timeout=_WAIT_S):
            if self._held is not None and (stream := self._held()) is not None:
                if stream.gi_running and self._holder == threading.get_ident():
                    return  # from `on_prefill`: the stream ends, and frees the model
                with contextlib.suppress(ValueError):  # it runs in another thread, and ends by itself
                    stream.close()
        try:
            self._free()
        finally:
            self._lock.release()

    @property
    def _size(self) -> int:
        """How many tokens the model knows."""
        return int(self.artifact.config["model"]["vocab_size"])

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that can be switched on; see `Artifact.adapter` for what is on by default."""
        return self.artifact.adapters

    def read(
        self,
        prompt: str | Sequence[Message],
        tools: Sequence[dict[str, Any]] = (),
        *,
        adapter: str | None = None,
        cancel: threading.Event | None = None,
    ) -> int:
        """Read ahead: a system prompt that conversations will begin with, or an answer that a next turn will follow.

        Whole pieces are read, up to the end of a turn, and kept for the prompts that follow and begin with them, under the same
        adapter; on disk, too, where the session has a prompt cache.

        Args:
            prompt, tools: as for `stream`.
            adapter: as in GenerationOptions.
            cancel: set it from any thread, and reading ends; what was read whole is kept.

        Returns:
            How many tokens are known now; 0 where it was cancelled while another generation was ahead.

        Raises:
            InputError, EdgetuneError: as `stream`.
        """
        request = self._request(prompt, GenerationOptions(adapter=adapter), cancel, tools, None)
        if not self._wait(request.cancel):
            self._open()  # raises where it is the session that was closed
            return 0
        try:
            self._open()
            whole = self._reader.whole(request.ids)
            options = request.options
            context = self._reader.begin(request.ids, request.limit, None, options.reuse, request.adapter, whole)
            with contextlib.suppress(Interrupted), context.interruptible(request.cancel):
                self._reader.read(context, request.ids[:whole], request.cancel)
            self._reader.keep(context)
        finally:
            self._lock.release()
        return len(context.ids)

    def forget(self) -> None:
        """Free what is kept of earlier prompts: their KV caches. Waits for a generation that runs.

        Raises:
            EdgetuneError: this thread reads a stream and has not ended it.
        """
        self._wait(None)
        try:
            if self._tokenizer is not None:
                self._reader.forget()
        finally:
            self._lock.release()

    def render(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> str:
        """The text that the chat template makes of a conversation, up to where the assistant's answer begins.

        Args:
            messages: the turns.
            tools: functions that the model may call, as OpenAI's API describes them.

        Raises:
            InputError: a message or tool is malformed, or the template refuses the conversation or knows no tools.
        """
        return self._rendered("messages", messages, tools)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; nothing is added in front or behind. Raises InputError for text that is not
        Unicode."""
        return self._encoded("text", text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens. Bytes that are no UTF-8 are left out. Raises InputError for what is no
        token of the model's."""
        stream = self._open().create_stream()  # Tokenizer.decode ends at the first byte that is no UTF-8
        return "".join(stream.decode(token) for token in checks.token_ids("ids", ids, self._size))

    def stream(
        self,
        prompt: str | Sequence[Message],
        options: GenerationOptions | None = None,
        cancel: threading.Event | None = None,
        *,
        tools: Sequence[dict[str, Any]] = (),
        on_prefill: OnPrefill | None = None,
        **fields: Unpack[OptionFields],
    ) -> Generator[Piece]:
        """Generate an answer, a piece a token.

        The prompt is checked at once; the work begins with the first piece. A generation that another one is
        ahead of waits for it. Close the iterator (`contextlib.closing`) or read it to its end: until then it
        holds the session, and a second generation of the same thread, which would wait for ever, is an error after two
        seconds. Closing the session ends it.

        Args:
            prompt: messages go through the chat template; a string is sent as it is.
            options: the defaults of GenerationOptions when None.
            cancel: set it from any thread, and the answer ends with reason `cancelled`, in the middle of the prompt, too.
            tools: functions that the model may call, as OpenAI's API describes them; what it calls is in
                `Completion.tool_calls`. With a string as prompt they only say which calls are looked for.
            on_prefill: called with the number of tokens of the prompt that are read, and of all, after each piece.
            fields: of GenerationOptions (`max_tokens=64, temperature=0.7`), in place of those of `options`.

        Raises:
            InputError: an option is out of range, there is no such adapter, the prompt is empty or leaves no room in the context, a token id is none
                of the model's, or the constraint cannot be followed.
            EdgetuneError: the runtime failed, or this thread reads a stream and has not ended it.
        """
        request = self._request(prompt, options_of(options, fields), cancel, tools, on_prefill)
        own: list[weakref.ref[Any]] = []
        found = self._stream(request, own)
        own.append(weakref.ref(found))
        return found

    def generate(
        self,
        prompt: str | Sequence[Message],
        options: GenerationOptions | None = None,
        cancel: threading.Event | None = None,
        *,
        tools: Sequence[dict[str, Any]] = (),
        on_prefill: OnPrefill | None = None,
        **fields: Unpack[OptionFields],
    ) -> Completion:
        """The whole answer; arguments and errors are those of `stream`."""
        found = None
        for piece in self.stream(prompt, options, cancel, tools=tools, on_prefill=on_prefill, **fields):
            found = piece.completion
        if found is None:  # the session was closed meanwhile
            raise checks.closed()
        return found

    def _request(
        self,
        prompt: str | Sequence[Message],
        options: GenerationOptions,
        cancel: threading.Event | None,
        tools: Sequence[dict[str, Any]],
        on_prefill: OnPrefill | None,
    ) -> Request:
        """What is asked for, checked. Raises InputError."""
        checks.event("cancel", cancel)
        checks.function("on_prefill", on_prefill)
        adapter = self.artifact.adapter(options.adapter)
        turns = None if isinstance(prompt, str) else checks.items("prompt", prompt, "a string or a list of messages")
        ids = self._encoded("prompt", prompt if isinstance(prompt, str) else self._rendered("prompt", turns, tools))
        if not ids:
            raise InputError("the prompt is empty", fix="give some text")
        room = self.artifact.max_length - len(ids)
        if room < 1:
            raise InputError(
                f"the prompt has {len(ids):,} tokens; the context holds {self.artifact.max_length:,}, "
                "the answer's included",
                fix="shorten it, or export with a larger export.max_length",
            )
        if (unknown := max(options.logit_bias, default=0)) >= self._size:
            what = f"the model has {self._size:,} tokens, none with id {checks.shown(unknown)}"
            raise InputError(what, where="logit_bias")
        limit = min(options.max_tokens or DEFAULT_MAX_TOKENS, room)
        names = tuple(tool["function"]["name"] for tool in checked_tools(tools))
        lasting = self._lasting(ids, turns, tools) if turns and self._cache is not None else 0
        return Request(ids, limit, options, Either(self._closing, cancel), on_prefill, names, adapter, lasting)

    def _lasting(self, ids: list[int], messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> int:
        """How many of a prompt's first tokens are those of its system prompt and tools: what it has in common with another user's words."""
        first = list(messages[:1]) if messages[0]["role"] == "system" else []
        if not (first or tools) or len(messages) == len(first):
            return 0
        said = str(messages[len(first)].get("content"))
        other: Message = {"role": "user", "content": "1" if said[:1] != "1" else "2"}
        try:
            others = self._encoded("prompt", self._rendered("prompt", [*first, other], tools))
        except InputError:  # a template that wants other turns
            return 0
        return next((i for i, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b), 0)

    def _rendered(self, where: str, messages: Any, tools: Sequence[dict[str, Any]]) -> str:
        what = "a list of messages" if where == "messages" else "a string or a list of messages"
        turns = checks.items(where, messages, what)
        self._open()
        return self._template.render(turns, checked_tools(tools))

    def _encoded(self, where: str, text: str) -> list[int]:
        checks.text(where, text)
        return [int(token) for token in self._open().encode(text)]

    def _wait(self, cancel: Cancel | None) -> bool:
        """Take the lock. Returns False, without it, where `cancel` was set meanwhile.

        Raises:
            EdgetuneError: a stream has the lock that this thread itself would have to read on.
        """
        began, waited = time.monotonic(), False
        while not self._lock.acquire(timeout=_WAIT_S):
            waited = True
            if cancel is not None and cancel.is_set():
                return False
            if self._holder != threading.get_ident() or self._held is None or self._held() is None:
                began = time.monotonic()
            elif time.monotonic() - began > _REST_S:
                raise EdgetuneError(
                    "a stream that this thread reads holds the session; waiting for it would never end",
                    fix="read the stream to its end, or close it: `with contextlib.closing(session.stream(…)) as stream:`",
                )
        if waited and cancel is not None and cancel.is_set():
            self._lock.release()
            return False
        return True

    def _stream(self, request: Request, own: list[weakref.ref[Any]]) -> Generator[Piece]:
        if not self._wait(request.cancel):
            yield cancelled(request)
            return
        self._held, self._holder = own[0], threading.get_ident()
        try:
            pieces: Any = self._answer(request).pieces()
            with contextlib.closing(pieces):
                for piece in pieces:
                    yield piece
                    self._holder = threading.get_ident()
        finally:
            self._held = None
            if self._closing.is_set():
                self._free()
            self._lock.release()

    def _free(self) -> None:
        if self._tokenizer is not None:
            self._model = self._tokenizer = None
            del self._reader, self._template

    def _answer(self, request: Request) -> Answer:
        decoder = self._open().create_stream()
        vocabulary = self._vocabulary if request.names_tokens else None
        return Answer(self._reader, self.artifact, decoder, vocabulary, request, self.settings.row_costs)

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(self.artifact.path / "tokenizer.json")

    def _open(self) -> Any:
        if self._tokenizer is None or self._closing.is_set():
            raise checks.closed()
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
        self._template.settle([(prompt["messages"], prompt["text"]) for prompt in golden["prompts"]])
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


def _difference(found: Sequence[Any], wanted: Sequence[Any]) -> str:
    """Where two sequences part, and what stands there."""
    at = next(
        (i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b),
        min(len(found), len(wanted)),
    )
    return f"from place {at}: {found[at : at + 12]!r}, not {wanted[at : at + 12]!r}"
