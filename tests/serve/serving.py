"""What the tests of the service share: a session without a model, and a running service."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from edgetune.errors import InputError
from edgetune.runtime.options import GenerationOptions
from edgetune.runtime.session import Completion, Piece
from edgetune.serve.app import create_app
from edgetune.serve.server import Server, bind, url


class FakeSession:
    """Answers by the last message's first word.

    `echo A B` gives the words back; `hold` gives one word, and then waits to be released or cancelled;
    `break` raises at once, `break-later` after its words; `refuse` is no conversation for the template;
    anything else is answered with `ok`.
    """

    def __init__(self) -> None:
        self.artifact = SimpleNamespace(name="tiny", max_length=512)
        self.adapters: tuple[str, ...] = ()
        self.release = threading.Event()
        self.asked: list[tuple[str, GenerationOptions]] = []
        self.cancelled: list[str] = []
        self.together = 0
        self.most_together = 0

    def render(self, messages: Sequence[dict[str, str]], tools: Sequence[Any] = ()) -> str:
        if messages[-1]["content"].startswith("refuse"):
            raise InputError("the template does not take this")
        return messages[-1]["content"]

    def encode(self, text: str) -> list[int]:
        return [0] * len(text.split())

    def stream(
        self, prompt: Any, options: GenerationOptions, cancel: threading.Event | None = None, *, tools: Any = ()
    ) -> Iterator[Piece]:
        self.together += 1
        self.most_together = max(self.together, self.most_together)
        try:
            yield from self._stream(prompt, options, cancel or threading.Event())
        finally:
            self.together -= 1

    def _stream(self, prompt: Any, options: GenerationOptions, cancel: threading.Event) -> Iterator[Piece]:
        prompt = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        self.asked.append((prompt, options))
        word, *words = prompt.split(" ")
        if word == "break":
            raise RuntimeError("the graph fell over")
        if word not in ("echo", "hold", "break-later"):
            words = ["ok"]
        said: list[str] = []
        for text in words or ["first"]:
            time.sleep(0.001)
            said.append(text if not said else " " + text)
            yield Piece(said[-1], (len(said),))
        if word == "break-later":
            raise RuntimeError("the graph fell over")
        cancelled = False
        if word == "hold":
            while not self.release.wait(0.005) and not (cancelled := cancel.is_set()):
                pass
            if cancelled:
                self.cancelled.append(prompt)
        ids = tuple(range(len(said)))
        reason: Any = "cancelled" if cancelled else "stop"
        yield Piece("", (), Completion("".join(said), ids, reason, len(prompt.split()), len(ids), 0.1, 10.0))


@contextlib.contextmanager
def served(session: Any, name: str = "tiny", queue: int = 8, system: str | None = None) -> Iterator[str]:
    """Run the service in a thread; yields its URL."""
    listener = bind("127.0.0.1", 0)
    address = url(listener)
    ready = threading.Event()
    server = Server(create_app(session, name, queue, system), listener, ready.set)
    thread = threading.Thread(target=server.run_until_signal)
    thread.start()
    try:
        assert ready.wait(10)
        yield address
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


def ask(content: Any = "echo hello", **more: Any) -> dict[str, Any]:
    """A request's body."""
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], **more}


@dataclass
class Response:
    """What came back, read to its end."""

    status: int
    headers: http.client.HTTPMessage
    text: str

    def json(self) -> Any:
        return json.loads(self.text)


def call(method: str, url: str, body: bytes | Iterable[bytes] | None = None) -> Response:
    """One request on a connection of its own; an iterable is sent in chunks."""
    host, slash, path = url.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(host, timeout=10)
    try:
        connection.request(method, slash + path, body)
        response = connection.getresponse()
        return Response(response.status, response.headers, response.read().decode())
    finally:
        connection.close()


def get(url: str) -> Response:
    """GET a URL."""
    return call("GET", url)


def post(address: str, body: Any) -> Response:
    """POST a body to the chat route."""
    return call("POST", f"{address}/v1/chat/completions", json.dumps(body).encode())


def events(response: Response) -> list[Any]:
    """The `data:` lines of a stream, as JSON; `[DONE]` as it is."""
    texts = [line.removeprefix("data: ") for line in response.text.split("\n") if line]
    return [text if text == "[DONE]" else json.loads(text) for text in texts]


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait until `condition` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
