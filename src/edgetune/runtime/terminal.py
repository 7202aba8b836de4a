"""The two ends of a terminal: what a person types, and text of a model that must not steer it."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, BinaryIO

from edgetune import progress
from edgetune.errors import InputError
from edgetune.files import home

if TYPE_CHECKING:
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings

_LONG_S = 2.0  # what is read sooner needs no bar
_BLOCK = '"""'


class ReadingBar:
    """Progress of reading a long prompt: call it with the tokens that are read, and all. A context manager.

    It shows up only where reading will take seconds.
    """

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._task: progress.Task | None = None
        self._first: tuple[float, int] | None = None
        self._done = 0

    def __enter__(self) -> ReadingBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = (now, done)
        elif self._task is None and done > self._first[1]:
            left = (now - self._first[0]) / (done - self._first[1]) * (total - done)
            if left > _LONG_S:
                self._task = self._stack.enter_context(progress.task("reading the prompt", total))
        if self._task:
            self._task.advance(done - self._done)
            self._done = done
        if done >= total:
            self._stack.close()
            self._task = None


@contextlib.contextmanager
def on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` at once when Ctrl-C is pressed while the block runs.

    Python's own handler waits until the main thread comes back from a native call, which may take seconds; `stop` runs in
    another thread, and can end that call. To be used in the main thread; in others it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    theirs, ours = socket.socketpair()
    theirs.setblocking(False)
    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)

    def listen() -> None:
        while number := ours.recv(1):
            if number[0] == signal.SIGINT:
                stop()

    listener = threading.Thread(target=listen, name="edgetune-interrupt", daemon=True)
    listener.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        theirs.close()
        listener.join()
        ours.close()


def printable(text: str) -> str:
    """The text without control characters but newline and tab: no escape sequence reaches the terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def after_enter(text: str) -> str | None:
    r"""What an Enter makes of the text so far: None when it is complete, else the text that goes on.

    A line that ends in `\` goes on, and so does a block that a `\"\"\"` has opened.
    """
    if text.lstrip().startswith(_BLOCK):
        return None if text.count(_BLOCK) > 1 else text + "\n"
    return text[:-1] + "\n" if text.endswith("\\") else None


def unquoted(text: str) -> str:
    r"""A complete turn as it is sent: without the `\"\"\"` around it, and without white space at its ends."""
    text = text.strip()
    if text.startswith(_BLOCK):
        text = text.removeprefix(_BLOCK).removesuffix(_BLOCK)
    return text.strip("\n")


def piped_turns(stream: BinaryIO) -> Iterator[str]:
    """Turns from a pipe: one a line, where no line goes on; empty lines are left out. Raises InputError."""
    text = ""
    for number, line in enumerate(stream, 1):
        try:
            text += line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InputError("is not UTF-8 text", where=f"line {number}", fix="give text in UTF-8") from error
        more = after_enter(text)
        if more is None:
            if turn := unquoted(text):
                yield turn
            text = ""
        else:
            text = more
    if turn := unquoted(text):
        yield turn


def typed_turns(commands: Sequence[str], notice: Callable[[str], None]) -> Iterator[str]:
    """Turns that a person types, with editing, history and completion of commands.

    Ends at Ctrl-D, or at a second Ctrl-C on an empty line.

    Args:
        commands: what Tab completes.
        notice: shows one line to the person.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.formatted_text import FormattedText

    prompt: PromptSession[str] = PromptSession(
        history=_history(),
        key_bindings=_keys(),
        multiline=True,
        completer=WordCompleter(list(commands), sentence=True),
        complete_while_typing=False,
        prompt_continuation=lambda width, _line, _wraps: "· ".rjust(width),
    )
    leaving = False
    while True:
        try:
            text = prompt.prompt(FormattedText([("bold", "> ")]))
        except EOFError:
            return
        except KeyboardInterrupt:
            if leaving:
                return
            leaving = not prompt.default_buffer.text
            if leaving:
                notice("Ctrl-C again or Ctrl-D leaves")
            continue
        leaving = False
        if turn := unquoted(text):
            yield turn


def _keys() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        more = after_enter(buffer.document.text) if buffer.document.is_cursor_at_the_end else None
        if more is None:
            buffer.validate_and_handle()
        else:
            buffer.text = more
            buffer.cursor_position = len(more)

    @keys.add("escape", "enter")  # Alt-Enter
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _history() -> History:
    """Past turns in `home()/history`, readable by their owner only; in memory where that cannot be
    written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    path = home() / "history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        with path.open("ab"):
            pass
    except OSError:
        return InMemoryHistory()

    class Turns(FileHistory):
        def store_string(self, string: str) -> None:
            with contextlib.suppress(OSError):  # a full disk is no reason to end the conversation
                super().store_string(string)

    return Turns(str(path))
