"""The queue without HTTP around it."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from serving import FakeSession

from edgetune.errors import EdgetuneError
from edgetune.runtime.options import GenerationOptions
from edgetune.runtime.session import Message
from edgetune.serve.worker import Cancelled, Failed, QueueFull, Worker

OPTIONS = GenerationOptions()


def say(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


class Stubborn(FakeSession):
    """Does not look at its cancel event, as a native call that runs."""

    def stream(self, prompt: str, options: GenerationOptions, cancel: threading.Event | None = None, **_: Any) -> Any:
        self.release.wait()
        return super().stream(prompt, options, cancel)


def worker(session: Any, waiting: int = 4) -> Worker:
    return Worker(session, waiting)


def test_a_busy_thread_is_told() -> None:
    async def run() -> bool:
        queue = worker(session)
        answer = queue.submit(say("echo a"), OPTIONS)
        await asyncio.sleep(0.05)
        queue.stop()
        with pytest.raises(Cancelled):  # its reader does not wait for the thread
            _ = [piece.text async for piece in answer]
        busy = not await asyncio.to_thread(queue.close, 0.1)
        session.release.set()
        assert await asyncio.to_thread(queue.close, 5)
        return busy

    session = Stubborn()
    assert asyncio.run(run())


def test_an_idle_thread_is_told() -> None:
    assert worker(FakeSession()).close(0)


def test_nothing_is_taken_after_the_stop() -> None:
    async def run() -> None:
        queue = worker(FakeSession())
        queue.stop()
        with pytest.raises(Cancelled):
            queue.submit(say("echo a"), OPTIONS)

    asyncio.run(run())


def test_a_cancel_that_comes_late_changes_nothing() -> None:
    async def run() -> None:
        queue = worker(FakeSession())
        answer = queue.submit(say("echo a b"), OPTIONS)
        assert [piece.text async for piece in answer] == ["a", " b"]
        answer.cancel()
        assert not answer.stop.is_set()
        assert answer.result().text == "a b"

    asyncio.run(run())


def test_places_count_from_the_call_on() -> None:
    async def run() -> None:
        queue = worker(FakeSession(), waiting=2)
        answers = [queue.submit(say(f"echo {n}"), OPTIONS) for n in range(3)]  # no turn of the loop in between
        with pytest.raises(QueueFull):
            queue.submit(say("echo 3"), OPTIONS)
        for n, answer in enumerate(answers):
            assert [piece.text async for piece in answer] == [str(n)]
        assert queue.load() == (0, 0)

    asyncio.run(run())


def test_no_path_of_this_machine_goes_to_the_client() -> None:
    class Broken(FakeSession):
        def stream(self, *_: Any, **__: Any) -> Any:
            raise EdgetuneError("the generation failed: no memory", where="/home/ann/artifact")

    async def run() -> None:
        with pytest.raises(Failed, match=r"^the generation failed: no memory$"):
            _ = [piece async for piece in worker(Broken()).submit(say("a"), OPTIONS)]

    asyncio.run(run())
