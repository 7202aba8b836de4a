"""The queue and the thread behind the service: one generation at a time, in the order of arrival.

The event loop owns the queue; the model's work happens in one thread, so that the loop stays free. A request
that is given up leaves the queue at once; one that runs is stopped at the next token.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from edgetune.errors import EdgetuneError, InputError

if TYPE_CHECKING:
    from edgetune.runtime.options import GenerationOptions
    from edgetune.runtime.session import Completion, Message, Piece, Session

_FIRST_GUESS_S = 5.0  # how long an answer takes, before one was measured
_MAX_RETRY_S = 60
# Where the session's options come from in a request, where they have other names.
_CONSTRAINTS = {"json_schema": "response_format", "regex": "structured_outputs", "grammar": "structured_outputs"}


class QueueFull(Exception):
    """There is no place; `retry_after` is about how many whole seconds it takes until there is."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full, try again in {retry_after} s")
        self.retry_after = retry_after


class Cancelled(Exception):
    """The answer was given up: its client went away, or the service stops."""


class Failed(Exception):
    """The generation raised an error of its own."""


class Refused(Exception):
    """The model cannot answer this request, and the request is to blame.

    Args:
        message: what is wrong and what to do.
        param: the request's parameter, where it is known.
        code: a short fixed word for programs.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param, self.code = param, code


class Answer:
    """One request's generation: iterate for its pieces as they come, then read `completion`.

    Iterating raises Failed, Refused or Cancelled.
    """

    def __init__(
        self, messages: Sequence[Message], options: GenerationOptions, tools: Sequence[dict[str, Any]] = ()
    ) -> None:
        self.messages, self.options, self.tools = messages, options, tools
        self.completion: Completion | None = None
        self.task: asyncio.Task[Completion] | None = None
        self.stop = threading.Event()
        self.running = False
        self.pieces: asyncio.Queue[Piece | None] = asyncio.Queue()  # None: there will be no more

    def cancel(self) -> None:
        """Give the answer up. Safe to call at any time, and more than once."""
        if self.task is None or self.task.done():
            return
        self.stop.set()
        self.pieces.put_nowait(None)  # who reads need not wait for the model to come to a halt
        if not self.running:
            self.task.cancel()  # still waiting: nothing of it is in the model's thread

    async def __aiter__(self) -> AsyncIterator[Piece]:
        while (piece := await self.pieces.get()) is not None:
            yield piece
        if self.task is None or self.stop.is_set():  # even where it ended meanwhile: not all text was read
            raise Cancelled
        error = self.task.exception()
        if isinstance(error, Refused):
            raise error
        if isinstance(error, EdgetuneError):
            raise Failed(error.what) from error
        if error:
            raise Failed(f"the generation failed: {type(error).__name__}: {error}") from error

    def result(self) -> Completion:
        """How the generation ended; only after iterating to the end."""
        if self.completion is None:
            raise RuntimeError("the generation has not ended")
        return self.completion


class Worker:
    """Runs the generations of one session.

    Args:
        session: the loaded artifact.
        waiting: how many requests may wait while one is answered.
    """

    def __init__(self, session: Session, waiting: int) -> None:
        self.session = session
        self._waiting = waiting
        self._answers: set[Answer] = set()
        self._turn = asyncio.Lock()  # first come, first served
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="edgetune-model")
        self._idle = threading.Event()
        self._idle.set()
        self._answer_s = _FIRST_GUESS_S
        self._stopping = False

    @property
    def stopping(self) -> bool:
        """Whether the service is going down."""
        return self._stopping

    def load(self) -> tuple[int, int]:
        """How many answers run (0 or 1) and how many wait."""
        running = sum(answer.running for answer in self._answers)
        return running, len(self._answers) - running

    def submit(
        self, messages: Sequence[Message], options: GenerationOptions, tools: Sequence[dict[str, Any]] = ()
    ) -> Answer:
        """Put a request at the end of the queue. To be called on the event loop.

        Raises:
            QueueFull: no place.
            Cancelled: the service stops.
        """
        if self._stopping:
            raise Cancelled
        if len(self._answers) > self._waiting:
            raise QueueFull(min(max(1, math.ceil(self._answer_s)), _MAX_RETRY_S))
        answer = Answer(messages, options, tools)
        self._answers.add(answer)
        answer.task = asyncio.get_running_loop().create_task(self._run(answer))
        answer.task.add_done_callback(lambda _: self._ended(answer))
        return answer

    def _ended(self, answer: Answer) -> None:
        self._answers.discard(answer)
        answer.pieces.put_nowait(None)
        # Asking for the exception also marks it as seen: asyncio reports those that nobody asked for.
        if answer.task and not answer.task.cancelled() and answer.task.exception() is None:
            answer.completion = answer.task.result()

    async def _run(self, answer: Answer) -> Completion:
        loop = asyncio.get_running_loop()
        async with self._turn:
            if answer.stop.is_set():
                raise asyncio.CancelledError
            answer.running = True
            started = time.monotonic()
            self._idle.clear()
            completion = await loop.run_in_executor(self._thread, self._generate, answer, loop)
            self._answer_s = time.monotonic() - started
            return completion

    def _generate(self, answer: Answer, loop: asyncio.AbstractEventLoop) -> Completion:
        """Runs in the model's thread."""
        completion = None
        try:
            for piece in self._pieces(answer):
                completion = piece.completion
                if (piece.text or piece.logprobs) and not answer.stop.is_set():
                    loop.call_soon_threadsafe(answer.pieces.put_nowait, piece)
        except InputError as error:
            param = _CONSTRAINTS.get(error.where or "", error.where)
            raise Refused(error.text(), param=param) from error
        finally:
            self._idle.set()
        if completion is None:
            raise RuntimeError("the stream ended without a completion")
        return completion

    def _pieces(self, answer: Answer) -> Iterator[Piece]:
        try:
            prompt = self.session.render(answer.messages, answer.tools)
            length, limit = len(self.session.encode(prompt)), self.session.artifact.max_length
        except InputError as error:
            raise Refused(error.text(), param="tools" if error.where == "tools" else "messages") from error
        if length >= limit:
            raise Refused(
                f"The prompt has {length} tokens; the context holds {limit}, the answer's included.",
                param="messages",
                code="context_length_exceeded",
            )
        return self.session.stream(answer.messages, answer.options, answer.stop, tools=answer.tools)

    def stop(self) -> None:
        """Cancel everything that runs or waits, and take no more."""
        self._stopping = True
        for answer in list(self._answers):
            answer.cancel()

    def close(self, timeout: float) -> bool:
        """Let the model's thread end. Returns False where it is still busy after `timeout` seconds."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        return self._idle.wait(timeout)
