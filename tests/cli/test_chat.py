"""`edgetune chat`: through a pipe, in a terminal, and stopping an answer."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from artifacts import tiny_artifact  # noqa: F401
from conftest import edgetune
from edgetune.errors import InputError
from edgetune.runtime.chat import Chat
from edgetune.runtime.conversation import Conversation
from edgetune.runtime.options import GenerationOptions
from edgetune.runtime.session import Completion, Piece
from edgetune.runtime.terminal import on_interrupt


class Slow:
    """A session that says `one two three …`, a word every 10 ms, and counts a word as a token."""

    def __init__(self, words: int = 1000, limit: int = 50) -> None:
        self.words, self.asked = words, []
        self.artifact = SimpleNamespace(max_length=limit, name="slow", size_mb=1.0)

    def render(self, messages: Any) -> str:
        return " ".join(message["content"] for message in messages)

    def encode(self, text: str) -> list[int]:
        return [0] * len(text.split())

    def stream(
        self, messages: Any, options: GenerationOptions, cancel: threading.Event, on_prefill: Any = None
    ) -> Iterator[Piece]:
        self.asked.append([dict(message) for message in messages])
        said: list[str] = []
        for n in range(self.words):
            if cancel.is_set():
                break
            said.append(f"word{n} ")
            yield Piece(said[-1], (n,))
            time.sleep(0.01)
        reason: Any = "cancelled" if cancel.is_set() else "stop"
        prompt = len(self.encode(self.render(messages)))
        yield Piece("", (), Completion("".join(said), tuple(range(len(said))), reason, prompt, len(said), 0.5, 9.5))


def chat(session: Slow, interactive: bool = True) -> tuple[Chat, Conversation]:
    conversation = Conversation()
    return Chat(session, conversation, GenerationOptions(), interactive), conversation  # type: ignore[arg-type]


def test_ctrl_c_stops_the_answer_only(capsys: pytest.CaptureFixture[str]) -> None:
    talk, conversation = chat(Slow())
    before = signal.getsignal(signal.SIGINT)
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    started = time.monotonic()
    assert talk.take("tell me") is True
    assert time.monotonic() - started < 5
    assert signal.getsignal(signal.SIGINT) is before
    out = capsys.readouterr()
    assert "word0 word1" in out.out and "what was said is kept" in out.err
    assert conversation.turns[1]["content"].startswith("word0 ")
    assert conversation.cut == 1
    assert talk.take("/stats") is True


def test_ctrl_c_before_the_first_word_takes_the_turn_back() -> None:
    session = Slow(words=1000)
    talk, conversation = chat(session)

    def nothing(messages: Any, options: Any, cancel: threading.Event, **_: Any) -> Iterator[Piece]:
        os.kill(os.getpid(), signal.SIGINT)
        assert cancel.wait(5)
        yield Piece("", (), Completion("", (), "cancelled", 3, 0, None, None))

    session.stream = nothing  # type: ignore[method-assign]
    talk.take("tell me")
    assert conversation.turns == []


def test_ctrl_c_is_noticed_during_a_native_call() -> None:
    """Python's handler has to wait until the call ends."""
    order: list[str] = []
    before = signal.signal(signal.SIGINT, lambda *_: order.append("handler"))
    try:
        with on_interrupt(lambda: order.append("stop")):
            threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT)).start()
            hashlib.pbkdf2_hmac("sha256", b"a", b"b", 1_500_000)  # a second that nothing interrupts
        assert order == ["stop", "handler"]
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_context_is_watched(capsys: pytest.CaptureFixture[str]) -> None:
    session = Slow(words=12, limit=40)
    talk, conversation = chat(session)
    talk.take("a b c")
    assert "nearly full" not in capsys.readouterr().err
    talk.take("a b c d e f g h")
    assert "nearly full: 35 of 40 tokens" in capsys.readouterr().err
    with pytest.raises(InputError, match="has 41 tokens with this turn; the context holds 40") as caught:
        talk.take("a b c d e f")
    assert "/reset" in caught.value.text() and "/save" in caught.value.text()
    assert len(conversation.turns) == 4 and len(session.asked) == 2  # nothing was sent, nothing cut
    talk.take("/reset")
    with pytest.raises(InputError, match="41 tokens") as caught:
        talk.take("word " * 41)
    assert "fewer words" in caught.value.text()


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session = Slow(words=2)
    talk, conversation = chat(session)
    talk.take("/system Be brief.")
    talk.take("//etc is what?")
    assert session.asked[0] == [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "/etc is what?"},
    ]  # fmt: skip
    talk.take("/stats")
    assert "time to first token 500 ms, 9.5 tokens/s" in (err := capsys.readouterr().err)
    assert "context: 7 of 50 tokens used (14%)" in err
    talk.take(f"/save {tmp_path / 'c.jsonl'}")
    assert f"row 1 of {tmp_path / 'c.jsonl'}" in capsys.readouterr().err
    with pytest.raises(InputError, match="/save needs a file"):
        talk.take("/save")
    talk.take("/reset")
    assert conversation.messages == [{"role": "system", "content": "Be brief."}]
    talk.take("/system -")
    assert conversation.messages == []
    talk.take("/help")
    err = capsys.readouterr().err
    assert all(word in err for word in ("/system", "/reset", "/save", "/stats", "/exit", "Ctrl-C"))
    for wrong, near in (("/quit", "/exit"), ("/sav x", "/save"), ("/rest", "/reset"), ("/", "/")):
        with pytest.raises(InputError) as caught:
            talk.take(wrong)
        assert f"did you mean {near}" in caught.value.text()
    assert talk.take("/exit") is False


# --- the program


def test_through_a_pipe(tiny_artifact: Path, tmp_path: Path) -> None:  # noqa: F811
    file = tmp_path / "c.jsonl"
    asked = ["chat", tiny_artifact, "--max-tokens", "8", "--temperature", "2", "--top-k", "0", "--seed", "3"]
    done = edgetune(*asked, stdin=f"Hello\n\nAnd again\\\non two lines\n/save {file}\n/stats\n")
    assert done.returncode == 0
    messages = json.loads(file.read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert [messages[0]["content"], messages[2]["content"]] == ["Hello", "And again\non two lines"]
    assert "row 1 of" in done.stderr and "2 of its answers ended early" in done.stderr
    assert "tokens used" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    shown = done.stdout.removesuffix("\n")
    assert all(c in "\n\t" or not (ord(c) < 32 or 0x7F <= ord(c) <= 0x9F) for c in shown)
    more = edgetune(*asked, "--load", file, stdin=f"Third\n/save {tmp_path / 'd.jsonl'}\n")
    assert more.returncode == 0
    assert json.loads((tmp_path / "d.jsonl").read_text())["messages"][:4] == messages


@pytest.mark.parametrize(("args", "stdin", "what"), [
    ([], "/sav x\n", "did you mean /save?"),
    ([], "word " * 300 + "\n", "the context holds 256"),
    (["--load", "missing.jsonl"], "", "missing.jsonl: no such file"),
    (["--top-k", "-1"], "", "top_k: must be"),
])  # fmt: skip
def test_bad_input(tiny_artifact: Path, args: list[str], stdin: str, what: str) -> None:  # noqa: F811
    done = edgetune("chat", tiny_artifact, *args, stdin=stdin)
    assert done.returncode == 2
    assert what in done.stderr and "Traceback" not in done.stderr


class Terminal:
    """The program in a terminal of its own."""

    def __init__(self, *command: str) -> None:
        self._ours, theirs = pty.openpty()
        self.child = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
                                      env={**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"})  # fmt: skip
        os.close(theirs)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def ready(self) -> None:
        """Wait for the prompt: after its line the cursor is back."""
        self.expect("\x1b[?2004h")
        self.expect("\x1b[?25h")

    def expect(self, text: str, within: float = 20) -> None:
        """Wait until `text` has been shown since the last time."""
        end = time.monotonic() + within
        while text not in self.seen:
            ready, _, _ = select.select([self._ours], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"{text!r} did not come; seen: {self.seen[-500:]!r}"
            self.seen += os.read(self._ours, 65536).decode(errors="replace")
        self.seen = self.seen.partition(text)[2]

    def close(self) -> int:
        code = self.child.wait(20)
        os.close(self._ours)
        return code


def test_in_a_terminal(tiny_artifact: Path, own_home: Path) -> None:  # noqa: F811
    terminal = Terminal(sys.executable, "-m", "edgetune", "chat", str(tiny_artifact), "--max-tokens", "6")
    try:
        terminal.expect("context 256 tokens; /help")
        terminal.ready()
        terminal.type("Hello\r")
        terminal.expect("the answer was cut after 6 tokens")
        terminal.ready()
        terminal.type("first\x1b\rsecond\\\rthird\r")  # Alt-Enter, then a backslash
        terminal.expect("the answer was cut after 6 tokens")
        terminal.ready()
        terminal.type("/stat\r")
        terminal.expect("did you mean /stats?")
        terminal.ready()
        terminal.type("/sta\t")
        time.sleep(0.5)  # completion runs beside the keys
        terminal.type("\r")
        terminal.expect("tokens used")
        terminal.ready()
        terminal.type("half a line\x03")  # Ctrl-C drops the line
        terminal.ready()
        terminal.type("\x03")
        terminal.expect("Ctrl-C again or Ctrl-D leaves")
        terminal.ready()
        terminal.type("\x04")
        assert terminal.close() == 0
    finally:
        terminal.child.kill()
    history = own_home / "history"
    assert history.stat().st_mode & 0o077 == 0
    assert "+first\n+second\n+third\n" in history.read_text()
