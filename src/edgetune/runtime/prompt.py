"""What commands read: the prompt from an argument, a file or a pipe, system prompt, JSON Schema, grammar and tools."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from edgetune.errors import InputError

# No context of a model that runs here holds so much; a wrong file is refused before it is tokenized.
_MOST_BYTES = 8 << 20


def read_prompt(argument: str | None, file: Path | None) -> str:
    """The prompt: the argument, else the file, else what is piped in. One line end at its end is dropped.

    Raises:
        InputError: argument and file are both given, nothing is given, it is empty, or it is not UTF-8 text.
    """
    if argument is not None and file is not None:
        raise InputError("there are two prompts: an argument and --file", fix="leave one out")
    if argument is not None:
        text, where = argument, None
    elif file is not None:
        if not file.is_file():
            raise InputError(_missing(file), where=file, fix="check the path; a pipe works too")
        with file.open("rb") as stream:
            text, where = _text(stream.read(_MOST_BYTES + 1), str(file)), str(file)
    elif not sys.stdin.isatty():
        text, where = _text(sys.stdin.buffer.read(_MOST_BYTES + 1), "stdin"), "stdin"
    else:
        raise InputError("there is no prompt", fix='`edgetune generate ARTIFACT "…"`, --file FILE, or a pipe')
    if not text.strip():
        raise InputError("the prompt is empty", where=where, fix="give some text")
    return text


def _text(data: bytes, where: str) -> str:
    if len(data) > _MOST_BYTES:
        raise InputError(f"has more than {_MOST_BYTES >> 20} MiB", where=where, fix="give a shorter prompt")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 text (byte {error.start})", where=where, fix="give text in UTF-8") from error
    if "\0" in text:
        raise InputError("is not text: it holds NUL characters", where=where, fix="give text in UTF-8")
    return text.removesuffix("\n").removesuffix("\r")


def read_system(value: str) -> str:
    """A system prompt: a file's text, where there is such a file, else the text itself. Raises InputError."""
    with contextlib.suppress(OSError, ValueError):  # a text may be too long for a file's name
        if Path(value).is_file():
            return read_prompt(None, Path(value))
    return read_prompt(value, None)


def read_schema(value: str) -> dict[str, Any]:
    """A JSON Schema from a file, or from the JSON itself. Raises InputError."""
    found, where = _json(value, "--json-schema")
    if not isinstance(found, dict):
        raise InputError("is not a JSON object", where=where, fix='such as {"type": "object"}')
    return found


def read_tools(value: str) -> list[dict[str, Any]]:
    """Descriptions of functions from a file, or from the JSON itself. Raises InputError."""
    from edgetune.runtime.tools import checked_tools

    return checked_tools(_json(value, "--tools")[0])


def read_grammar(value: str) -> str:
    """A grammar from a file, or the grammar itself, which names its `start`. Raises InputError."""
    if "start" in value and ":" in value and not Path(value).is_file():
        return value
    return _file(value, "--grammar", "a grammar with a rule `start`")


def _json(value: str, option: str) -> tuple[Any, str]:
    """What a JSON text says, or the file that is named; and its place."""
    where = option
    if not value.lstrip().startswith(("{", "[")):
        where, value = value, _file(value, option, "the JSON itself")
    try:
        return json.loads(value), where
    except json.JSONDecodeError as error:
        raise InputError(f"is not JSON: {error}", where=where) from error


def _file(name: str, option: str, otherwise: str) -> str:
    path = Path(name)
    if not name.strip() or not path.is_file():
        what = _missing(path) if name.strip() else "is empty"
        raise InputError(what, where=name.strip() or option, fix=f"give a file, or {otherwise}")
    return _text(path.read_bytes(), name)


def _missing(path: Path) -> str:
    return "is a folder" if path.is_dir() else "no such file"
