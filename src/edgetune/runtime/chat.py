"""The chat on a terminal or through a pipe: turns, commands, and the watch over the context."""

from __future__ import annotations

import contextlib
import difflib
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from edgetune import progress
from edgetune.errors import EdgetuneError, InputError, from_system_error
from edgetune.runtime.artifact import NO_ADAPTER
from edgetune.runtime.completion import Completion, Message
from edgetune.runtime.conversation import Conversation
from edgetune.runtime.options import GenerationOptions
from edgetune.runtime.session import Session
from edgetune.runtime.terminal import on_interrupt, piped_turns, printable, typed_turns

_HELP = """\
/system TEXT  set the system prompt; alone it shows it, `/system -` removes it
/adapter NAME switch to an adapter of the artifact, `none` to its base; alone it lists them
/reset        start a new conversation; the system prompt stays
/save FILE    add the conversation to a JSON Lines file, as one row to train on
/stats        speed, time to first token, how full the context is
/exit         leave; so does Ctrl-D
Enter sends. Alt-Enter, a line that ends in \\, or a block in \"\"\" goes on with a new line.
Ctrl-C stops an answer. A turn that begins with / is sent when it is written with //."""
_COMMANDS = ("/help", "/system", "/adapter", "/reset", "/save", "/stats", "/exit")
_NEARLY_FULL = 0.8
_PATIENCE = 3  # Ctrl-C presses during one answer, before they end the program


def run(session: Session, conversation: Conversation, options: GenerationOptions) -> None:
    """Chat until the person leaves or the pipe ends.

    With a terminal on both sides, what goes wrong is said and the chat goes on. Through a pipe a line is a
    turn, stdout has the answers and nothing else, and the first refusal ends it.

    Raises:
        InputError: through a pipe: an unknown command, a conversation that does not fit any more.
        EdgetuneError: the runtime failed.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        chat = Chat(session, conversation, options, interactive=False)
        for turn in piped_turns(sys.stdin.buffer):
            if not chat.take(turn):
                return
        return
    chat, what = Chat(session, conversation, options, interactive=True), session.artifact
    chat.notice(f"{printable(what.name)}, {what.size_mb:,.0f} MB, context {what.max_length:,} tokens; /help")
    if what.adapters:
        chat.take("/adapter")
    # A Ctrl-C that comes just after an answer has ended, before the next prompt reads keys, does nothing.
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        for turn in typed_turns(_COMMANDS, chat.notice):
            if not chat.try_to_take(turn):
                return
    finally:
        signal.signal(signal.SIGINT, before)


class Chat:
    """One conversation with a session.

    Args:
        session: the loaded artifact.
        conversation: where it begins.
        options: how answers are made.
        interactive: whether a person reads along, who can stop an answer and is told of things.
    """

    def __init__(
        self, session: Session, conversation: Conversation, options: GenerationOptions, interactive: bool
    ) -> None:
        self._session, self._conversation, self._options = session, conversation, options
        self._interactive = interactive
        self._last: Completion | None = None

    def notice(self, text: str) -> None:
        """Say something about the chat, on stderr."""
        progress.say(f"\x1b[2m{text}\x1b[0m" if progress.interactive() else text)

    def take(self, turn: str) -> bool:
        """Answer a turn or do a command; False when the person leaves. Raises InputError, OSError."""
        if turn.startswith("/") and not turn.startswith("//"):
            return self._command(turn)
        self._answer(turn.removeprefix("/") if turn.startswith("//") else turn)
        return True

    def try_to_take(self, turn: str) -> bool:
        """`take`, which says what goes wrong and lets the chat go on."""
        try:
            return self.take(turn)
        except EdgetuneError as error:
            self.notice(printable(error.text()))
        except OSError as error:
            known = from_system_error(error)
            if known is None:
                raise
            self.notice(printable(known.text()))
        return True

    def _command(self, turn: str) -> bool:
        word, _, rest = turn.partition(" ")
        rest = rest.strip()
        match word:
            case "/help":
                self.notice(_HELP)
            case "/system":
                self._system(rest)
            case "/adapter":
                self._adapter(rest)
            case "/reset":
                self._conversation.reset()
                self._last = None
                self.notice("a new conversation")
            case "/save":
                self._save(rest)
            case "/stats":
                self.notice(self._stats())
            case "/exit":
                return False
            case _:
                near = difflib.get_close_matches(word, _COMMANDS, 1, 0.0)[0]
                raise InputError(f"no command {printable(word)}", fix=f"did you mean {near}? /help shows all")
        return True

    def _system(self, text: str) -> None:
        if text:
            self._conversation.system = None if text == "-" else text
        now = self._conversation.system
        self.notice(f"system prompt: {printable(now)}" if now else "no system prompt of yours")

    def _adapter(self, name: str) -> None:
        found = self._session.artifact
        if name:
            found.adapter(name)
            self._options = replace(self._options, adapter=name)
        names = ", ".join(found.adapters) or "none, it carries no adapters"
        self.notice(f"adapter: {found.adapter(self._options.adapter) or NO_ADAPTER}; of {names}")

    def _save(self, name: str) -> None:
        if not name:
            raise InputError("/save needs a file", fix="/save chats.jsonl")
        path = Path(name).expanduser()
        row = self._conversation.save(path)
        cut = self._conversation.cut
        self.notice(f"row {row} of {path}" + (f"; {cut} of its answers ended early" if cut else ""))

    def _stats(self) -> str:
        used, limit = self._tokens(self._conversation.messages), self._session.artifact.max_length
        context = f"context: {used:,} of {limit:,} tokens used ({used / limit:.0%})"
        if self._last is None:
            return f"no answer yet; {context}"
        return f"{self._last.describe()}\n{context}"

    def _tokens(self, messages: list[Message]) -> int:
        return len(self._session.encode(self._session.render(messages))) if messages else 0

    def _answer(self, text: str) -> None:
        turns, limit = self._conversation.turns, self._session.artifact.max_length
        turn: Message = {"role": "user", "content": text}
        used = self._tokens([*self._conversation.messages, turn])
        if used >= limit:
            raise InputError(
                f"the conversation has {used:,} tokens with this turn; the context holds {limit:,}",
                fix="/reset starts a new one (/save FILE keeps this one first)" if turns else "say it in fewer words",
            )
        answer = self._print_answer([*self._conversation.messages, turn])
        self._last = answer
        if answer.finish_reason == "cancelled" and not answer.text:
            self.notice("stopped; the turn is taken back")
            return
        turns += [turn, {"role": "assistant", "content": answer.text}]
        if answer.finish_reason != "stop":
            self._conversation.cut += 1
        self._tell_end(answer, limit)

    def _tell_end(self, answer: Completion, limit: int) -> None:
        used = answer.prompt_tokens + answer.completion_tokens
        if answer.finish_reason == "cancelled":
            self.notice("stopped; what was said is kept")
        elif used >= limit:
            self.notice(f"the answer was cut: the context of {limit:,} tokens is full; /reset starts anew")
        elif answer.finish_reason == "length":
            self.notice(f"the answer was cut after {answer.completion_tokens:,} tokens; --max-tokens allows more")
        elif used > _NEARLY_FULL * limit:
            self.notice(f"the context is nearly full: {used:,} of {limit:,} tokens; /reset starts anew")

    def _print_answer(self, messages: list[Message]) -> Completion:
        """Stream the answer to stdout, followed by a new line."""
        cancel = threading.Event()
        answer = None
        waiting = self._interactive
        if waiting:
            print("…", end="", flush=True)
        with _stops(cancel) if self._interactive else contextlib.nullcontext():
            stream = self._session.stream(messages, self._options, cancel, on_prefill=_show_share if waiting else None)
            for piece in stream:
                text = printable(piece.text)
                if waiting and (text or piece.completion):
                    print("\r      \r", end="")  # takes the mark of waiting away
                    waiting = False
                print(text, end="", flush=True)
                answer = piece.completion
        print("\n" if self._interactive else "", flush=True)
        assert answer is not None
        return answer


def _show_share(done: int, total: int) -> None:
    """How much of the turn is read, behind the mark of waiting."""
    print(f"\r… {done / total:.0%}", end="", flush=True)


@contextlib.contextmanager
def _stops(cancel: threading.Event) -> Iterator[None]:
    """Ctrl-C sets `cancel` while the block runs. Pressed again and again, it interrupts."""
    presses = 0

    def stop(number: int, frame: object) -> None:
        nonlocal presses
        presses += 1
        if presses > _PATIENCE:
            raise KeyboardInterrupt
        cancel.set()

    before = signal.signal(signal.SIGINT, stop)
    try:
        with on_interrupt(cancel.set):
            yield
    finally:
        signal.signal(signal.SIGINT, before)
