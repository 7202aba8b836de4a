"""What `generate` reads: the prompt from an argument, a file or a pipe, and the JSON Schema."""

from __future__ import annotations

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
            raise InputError("no such file", where=file, fix="check the path; a pipe works too")
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


def read_schema(value: str) -> dict[str, Any]:
    """A JSON Schema from a file, or from the JSON itself (which begins with `{`). Raises InputError."""
    where = "--json-schema"
    if not value.lstrip().startswith("{"):
        where = value
        path = Path(value)
        if not path.is_file():
            raise InputError("no such file", where=where, fix="give a file, or the JSON Schema itself")
        value = _text(path.read_bytes(), where)
    try:
        schema = json.loads(value)
    except json.JSONDecodeError as error:
        raise InputError(f"is not JSON: {error}", where=where, fix='such as {"type": "object"}') from error
    if not isinstance(schema, dict):
        raise InputError("is not a JSON object", where=where, fix='such as {"type": "object"}')
    return schema
