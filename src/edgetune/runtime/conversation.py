"""A conversation as chat keeps it, saves it and reads it back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgetune.errors import InputError
from edgetune.files import write_text
from edgetune.runtime.completion import Message

_FIX = 'one JSON object a line: {"messages": [{"role": "user", "content": "…"}, …]}'


class Conversation:
    """A system prompt and the turns after it.

    Attributes:
        system: the system prompt, None: what the model's template does by itself.
        turns: user and assistant in turns.
        cut: how many answers ended early; whoever trains on them should know.
    """

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self.turns: list[Message] = []
        self.cut = 0
        self._saved: tuple[Path, str] | None = None

    @property
    def messages(self) -> list[Message]:
        """What goes through the chat template."""
        head: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return [*head, *self.turns]

    def reset(self) -> None:
        """Forget the turns, keep the system prompt."""
        self.turns, self.cut, self._saved = [], 0, None

    def save(self, path: Path) -> int:
        """Add the conversation to a JSON Lines file as one row of the training form.

        Saved again to the same file, its row is brought up to date and not doubled. Rows of others stay.

        Returns:
            The row's number in the file, from 1.

        Raises:
            InputError: there is nothing to save, or the file is not JSON Lines.
            OSError: it cannot be written.
        """
        if not self.turns:
            raise InputError("there is nothing to save yet", fix="say something first")
        rows = _rows(path) if path.exists() else []
        row = json.dumps({"messages": self.messages}, ensure_ascii=False)
        if self._saved and rows and self._saved == (path.resolve(), rows[-1]):
            rows.pop()
        write_text(path, "".join(f"{line}\n" for line in [*rows, row]))
        self._saved = (path.resolve(), row)
        return len(rows) + 1

    def load(self, path: Path) -> None:
        """Go on with the last conversation of a JSON Lines file. A system prompt that is set already stays.

        Raises:
            InputError: the file is missing or holds no conversation that ends with an answer.
        """
        if not path.is_file():
            raise InputError("no such file", where=path, fix="`/save FILE` in chat writes one")
        rows = _rows(path)
        if not rows:
            raise InputError("is empty", where=path, fix=_FIX)
        where = f"{path}:{len(rows)}"
        messages = json.loads(rows[-1]).get("messages")
        if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
            raise InputError("holds no messages", where=where, fix=_FIX)
        system = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
        turns = messages[system is not None :]
        roles = [message["role"] for message in turns]
        if not turns or roles != ["user", "assistant"] * (len(turns) // 2):
            raise InputError(
                "the conversation must go user, assistant, user, … and end with an answer",
                where=where,
                fix=_FIX,
            )
        self.reset()
        self.system = system if self.system is None else self.system
        self.turns = [{"role": message["role"], "content": message["content"]} for message in turns]


def _rows(path: Path) -> list[str]:
    """The lines of a JSON Lines file, each checked to be an object."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError("is not UTF-8 text", where=path, fix="choose a JSON Lines file") from error
    rows = [line for line in lines if line.strip()]
    for number, row in enumerate(rows, 1):
        try:
            whole = isinstance(json.loads(row), dict)
        except json.JSONDecodeError:
            whole = False
        if not whole:
            raise InputError("is not a JSON object, so this is no JSON Lines file", where=f"{path}:{number}", fix=_FIX)
    return rows


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)
