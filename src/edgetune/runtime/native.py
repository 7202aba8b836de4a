"""The border to ONNX Runtime GenAI: its errors as ours."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from edgetune.errors import EdgetuneError
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
