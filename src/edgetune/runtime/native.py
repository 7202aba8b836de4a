"""The border to ONNX Runtime GenAI: its errors as ours, and text that it can take."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from edgetune.errors import EdgetuneError, InputError
from edgetune.runtime.artifact import Artifact


@contextlib.contextmanager
def native(what: str, artifact: Artifact, cure: Callable[[str], str] | None = None) -> Iterator[None]:
    """The runtime's errors, which are all RuntimeError, as EdgetuneError; `cure` says what to do about one by its text."""
    try:
        yield
    except RuntimeError as error:
        fix = cure(str(error)) if cure else None
        raise EdgetuneError(f"{what}: {first_line(error)}", where=artifact.path, fix=fix) from error


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def check_text(text: str) -> None:
    """Raises InputError for text that the native side would cut or cannot take."""
    if "\0" in text:  # the native side would take it for the end
        raise InputError("the text holds a NUL character", fix="give text, not a binary file")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"the text is not Unicode ({error.reason} at {error.start})", fix="give UTF-8 text") from error
