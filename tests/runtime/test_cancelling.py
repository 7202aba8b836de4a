"""Sessions between threads: cancelling, waiting, closing."""

from __future__ import annotations

import ctypes
import itertools
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from artifacts import tiny_artifact  # noqa: F401
from edgetune import runtime
from edgetune.errors import EdgetuneError, InputError
from edgetune.runtime import capi
from edgetune.runtime.options import GenerationOptions
from edgetune.runtime.session import Piece, Session
from edgetune.runtime.speculation import Lookup

ASK: Any = [{"role": "user", "content": "What is 2 plus 2?"}]


@pytest.fixture(scope="module")
def session(tiny_artifact: Path) -> Iterator[Session]:  # noqa: F811
    with runtime.load(tiny_artifact) as found:
        yield found


def test_cancel_from_another_thread(session: Session) -> None:
    cancel, started = threading.Event(), threading.Event()
    pieces: list[Piece] = []

    def read() -> None:
        for piece in session.stream(ASK, GenerationOptions(temperature=1.0, top_k=5, seed=1), cancel):
            pieces.append(piece)
            started.set()
            time.sleep(0.002)

    reader = threading.Thread(target=read)
    reader.start()
    assert started.wait(10)
    cancel.set()
    reader.join(10)
    assert not reader.is_alive()
    last = pieces[-1].completion
    assert last is not None
    assert last.finish_reason == "cancelled"
    assert last.completion_tokens == len(pieces) - 1 < 150
    assert last.text == "".join(piece.text for piece in pieces)
    assert session.generate(ASK, GenerationOptions(max_tokens=5)).completion_tokens == 5


def test_cancelled_before_it_begins(session: Session) -> None:
    cancel = threading.Event()
    cancel.set()
    answer = session.generate(ASK, cancel=cancel)
    assert (answer.finish_reason, answer.ids, answer.ttft_s) == ("cancelled", (), None)


def test_a_second_generation_waits_and_can_be_cancelled(session: Session) -> None:
    first = session.stream(ASK, GenerationOptions(max_tokens=10))
    next(first)  # holds the session
    ended: dict[str, Any] = {}

    def ask(name: str, cancel: threading.Event) -> None:
        ended[name] = session.generate(ASK, GenerationOptions(max_tokens=10), cancel)

    give_up = threading.Event()
    threads = {
        name: threading.Thread(target=ask, args=(name, event))
        for name, event in {"gives up": give_up, "waits": threading.Event()}.items()
    }
    for thread in threads.values():
        thread.start()
    time.sleep(0.15)
    assert not ended
    give_up.set()
    threads["gives up"].join(10)
    assert ended["gives up"].finish_reason == "cancelled"
    rest = list(first)
    threads["waits"].join(10)
    assert rest[-1].completion is not None
    assert ended["waits"].ids == rest[-1].completion.ids


def test_a_stream_left_early_frees_the_session(session: Session) -> None:
    with closing(session.stream(ASK)) as stream:
        next(stream)
    for _ in session.stream(ASK):
        break
    assert session.generate(ASK, GenerationOptions(max_tokens=3)).completion_tokens == 3


def test_threads_do_not_mix(session: Session) -> None:
    asks: list[Any] = [[{"role": "user", "content": f"Question {n}, please."}] for n in range(6)]
    options = [GenerationOptions(max_tokens=30, temperature=1.0, top_k=0, seed=n) for n in range(6)]
    alone = [session.generate(ask, option).ids for ask, option in zip(asks, options, strict=True)]
    together: dict[int, list[Any]] = {}

    def ask(n: int) -> None:
        together[n] = list(session.stream(asks[n], options[n]))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for n in range(6):
        assert together[n][-1].completion.ids == alone[n]
        assert tuple(itertools.chain(*(piece.ids for piece in together[n]))) == alone[n]


def slow(monkeypatch: pytest.MonkeyPatch, name: str, at: int = 0) -> threading.Event:
    """Let a native call of generators take until somebody interrupts it, from its `at`-th time on; set while it runs."""
    real, running, calls = getattr(capi.Generator, name), threading.Event(), itertools.count()

    def call(generator: capi.Generator, *given: Any) -> Any:
        if next(calls) < at:
            return real(generator, *given)
        running.set()
        real(generator, *given)  # what it leaves behind is there, as after half of the work
        for _ in range(2000):
            if generator._interrupted:
                raise capi.Interrupted
            time.sleep(0.005)
        raise AssertionError("nobody interrupted it")

    monkeypatch.setattr(capi.Generator, name, call)
    return running


@pytest.mark.parametrize(
    ("name", "at", "options"),
    [
        ("append_tokens", 0, {}),  # the first piece of the prompt
        ("append_tokens", 1, {}),  # the second
        ("append_tokens", 5, {"speculation": "on"}),  # while guessing
        ("generate_next_token", 0, {}),
        ("generate_next_token", 3, {"temperature": 1.0, "seed": 1}),
        ("generate_next_token", 3, {"regex": "[a-z]{30}"}),
    ],
)
@pytest.mark.parametrize("how", ["cancel", "close"])
def test_a_native_call_is_interrupted(
    tiny_artifact: Path,  # noqa: F811
    session: Session,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    at: int,
    options: dict[str, Any],
    how: str,
) -> None:
    prompt, cancel = "One two three four five six seven. " * 7, threading.Event()
    own = runtime.load(tiny_artifact)
    running, found = slow(monkeypatch, name, at), list[Any]()
    thread = threading.Thread(target=lambda: found.append(own.generate(prompt, None, cancel, max_tokens=40, **options)))
    thread.start()
    assert running.wait(10)
    if how == "cancel":
        cancel.set()
    else:
        own.close()
    thread.join(10)
    assert found[0].finish_reason == "cancelled"
    assert (
        found[0].completion_tokens == {"append_tokens": max(at - 1, 0), "generate_next_token": at}[name]
        or "speculation" in options
    )
    monkeypatch.undo()
    if how == "cancel":  # and what was read whole is known, and right
        plain = session.generate(prompt, max_tokens=40, **{**options, "speculation": "off", "reuse": "off"})
        again = own.generate(prompt, max_tokens=40, **{**options, "speculation": "off"})
        assert again.ids == plain.ids
        assert again.cached_tokens == (
            at * 64 if name == "append_tokens" and not options else again.prompt_tokens // 64 * 64
        )
        own.close()


def test_an_interrupted_generator_goes_on(session: Session) -> None:
    model = session._model
    params = capi.GeneratorParams(model)
    params.set_search_options(max_length=64, do_sample=False)
    one, other = capi.Generator(model, params), capi.Generator(model, params)
    ids = session.encode("One two three four.")
    for generator in (one, other):
        generator.append_tokens(ids)
    one.interrupt()
    for call in (one.generate_next_token, one.is_done, lambda: one.append_tokens(ids)):
        with pytest.raises(capi.Interrupted):
            call()
    one.resume(len(ids) - 2)
    one.append_tokens(ids[-2:])
    other.rewind_to(len(ids) - 2)
    other.append_tokens(ids[-2:])
    assert (one.get_logits() == other.get_logits()).all()


def test_what_takes_time_gives_pythons_lock_away(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    library, calls = capi._library(), set[tuple[str, bool]]()
    assert isinstance(library.fast, ctypes.PyDLL) and not isinstance(library.slow, ctypes.PyDLL)
    real = capi._Library.call

    def call(self: Any, name: str, *given: Any, slow: bool = False) -> None:
        calls.add((name.removeprefix("OgaGenerator_"), slow))
        real(self, name, *given, slow=slow)

    monkeypatch.setattr(capi._Library, "call", call)
    session.generate(ASK, max_tokens=4, temperature=1.0, reuse="off")
    slow = {name for name, gives in calls if gives}
    assert slow == {"OgaCreateGenerator", "AppendTokens", "GenerateNextToken", "GetLogits"}
    assert not slow & {name for name, gives in calls if not gives}


def test_errors_of_the_c_interface(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capi, "_NAMES", {sys.platform: "missing.so"})
    with pytest.raises(EdgetuneError, match="library does not load") as caught:
        capi._Library()
    assert str(caught.value.where).endswith("missing.so") and caught.value.fix
    with pytest.raises(RuntimeError, match="nowhere"):
        capi.Config("nowhere")
    params = capi.GeneratorParams(session._model)
    with pytest.raises(RuntimeError, match="no_such_option"):
        params.set_search_options(no_such_option=1)
    params.set_search_options(max_length=8)
    generator = capi.Generator(session._model, params)
    with pytest.raises(RuntimeError, match="exceeds max length"):
        generator.append_tokens([1] * 9)
    generator.append_tokens([1, 2, 3])
    assert list(generator.get_sequence(0)) == [1, 2, 3] and generator.token_count() == 3
    with pytest.raises(RuntimeError, match="nothing"):
        generator.get_output("nothing")


@pytest.mark.parametrize(
    "options", [{"speculation": "on"}, {"regex": "[a-z ]{60}"}, {"json_schema": {"type": "string"}}]
)
def test_no_token_comes_after_a_cancel(session: Session, options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where several come in a step, too."""
    if "speculation" in options:  # all that is guessed is right
        plain = session.generate(ASK, max_tokens=60, exact=True).ids
        start = len(session.encode(session.render(ASK)))

        def guess(lookup: Lookup, most: int) -> tuple[list[int], int]:
            return list(plain[len(lookup._ids) - start :][:most]), 4

        monkeypatch.setattr(Lookup, "guess", guess)
    cancel, seen = threading.Event(), 0
    for piece in session.stream(ASK, None, cancel, max_tokens=60, **options):
        seen += len(piece.ids)
        if seen == 5:
            cancel.set()
    assert piece.completion is not None
    assert (piece.completion.completion_tokens, piece.completion.finish_reason) == (5, "cancelled")
    if "speculation" in options:
        assert session.generate(ASK, max_tokens=60, speculation="off").ids == plain


@pytest.mark.timeout(60)
def test_a_thread_does_not_wait_for_its_own_stream(session: Session) -> None:
    with closing(session.stream(ASK)) as stream:
        next(stream)
        for call in (lambda: session.generate(ASK), lambda: session.read(ASK), session.forget):
            with pytest.raises(EdgetuneError, match="a stream that this thread reads holds the session") as caught:
                call()
            assert "closing" in (caught.value.fix or "")
        next(stream)  # nothing happened to it
    assert session.generate(ASK, max_tokens=3).completion_tokens == 3


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", ["forget", "read", "generate"])
def test_nor_from_on_prefill(session: Session, what: str) -> None:
    def on_prefill(*_: int) -> None:
        session.forget() if what == "forget" else getattr(session, what)(ASK)

    with pytest.raises(EdgetuneError, match="a stream that this thread reads"):
        session.generate(ASK, on_prefill=on_prefill, max_tokens=3)
    assert session.generate(ASK, max_tokens=3).completion_tokens == 3


@pytest.mark.timeout(60)
def test_it_waits_for_a_stream_that_another_thread_reads_on(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgetune.runtime.session._REST_S", 0.5)
    stream = session.stream(ASK, max_tokens=5)
    next(stream)

    def read_on() -> None:
        for _ in stream:
            time.sleep(0.4)

    other = threading.Thread(target=read_on)
    other.start()
    assert session.generate(ASK, max_tokens=3).completion_tokens == 3
    other.join(10)
    assert not other.is_alive()


def test_reading_ahead_is_cancelled(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    cancel = threading.Event()
    prompt = "Five six seven eight nine ten. " * 8
    whole = session.read(prompt)
    session.forget()
    cancel.set()
    assert session.read(prompt, cancel=cancel) == 0
    cancel.clear()
    running, found = slow(monkeypatch, "append_tokens", 1), list[int]()
    thread = threading.Thread(target=lambda: found.append(session.read(prompt, cancel=cancel)))
    thread.start()
    assert running.wait(10)
    cancel.set()
    thread.join(10)
    monkeypatch.undo()
    assert 0 < found[0] < whole == session.read(prompt)


def test_closed(tiny_artifact: Path) -> None:  # noqa: F811
    session = runtime.load(tiny_artifact)
    stream = session.stream(ASK)
    session.close()
    session.close()
    session.forget()
    for use in (lambda: session.generate(ASK), lambda: session.read("Hi"), lambda: next(stream)):
        with pytest.raises(EdgetuneError, match="the session is closed") as caught:
            use()
        assert caught.value.fix
    with runtime.load(tiny_artifact) as session:
        session.close()
    for threads in (0, 100_000):  # the latter would take all memory for its threads
        with pytest.raises(InputError, match="threads: must be 1 to"):
            runtime.load(tiny_artifact, threads=threads)


def test_closing_from_within(tiny_artifact: Path) -> None:  # noqa: F811
    with runtime.load(tiny_artifact) as session:
        answer = session.generate("One two three four. " * 9, on_prefill=lambda *_: session.close())
        assert (answer.finish_reason, answer.ids) == ("cancelled", ())
        with pytest.raises(EdgetuneError, match="the session is closed"):
            session.generate(ASK)


def test_closing_ends_a_stream_that_is_half_read(tiny_artifact: Path) -> None:  # noqa: F811
    with runtime.load(tiny_artifact) as session:
        stream = session.stream(ASK)
        next(stream)
    assert list(stream) == []


def test_closing_ends_an_answer_and_those_that_wait(tiny_artifact: Path) -> None:  # noqa: F811
    session, ended = runtime.load(tiny_artifact), list[str]()

    def ask() -> None:
        for piece in session.stream(ASK, temperature=1.0, logit_bias={2: -100}):
            started.set()
            time.sleep(0.01)
            if piece.completion is not None:
                ended.append(piece.completion.finish_reason)

    started = threading.Event()
    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert started.wait(10)
    time.sleep(0.1)
    session.close()
    for thread in threads:
        thread.join(10)
    assert 2 <= len(ended) <= 3 and set(ended) == {"cancelled"}  # the one that ran may just have ended
