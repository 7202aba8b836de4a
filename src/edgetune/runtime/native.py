"""The border to ONNX Runtime and its GenAI: their errors as ours, and what they print."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable, Iterator

from edgetune.errors import EdgetuneError, first_line
from edgetune.runtime.artifact import Artifact


@contextlib.contextmanager
def native(what: str, artifact: Artifact, cure: Callable[[str], str] | None = None) -> Iterator[None]:
    """The runtime's errors, which are all RuntimeError, as EdgetuneError; `cure` says what to do about one by its text."""
    try:
        yield
    except RuntimeError as error:
        fix = cure(str(error)) if cure else None
        raise EdgetuneError(f"{what}: {first_line(error)[:300]}", where=artifact.path, fix=fix) from error


def is_native(error: Exception) -> bool:
    """Whether an error is ONNX Runtime's: some releases derive theirs from RuntimeError, others do not."""
    return type(error).__module__.startswith("onnxruntime") or isinstance(error, RuntimeError | ValueError)


@contextlib.contextmanager
def off_stdout() -> Iterator[None]:
    """What native libraries print (QNN's does) goes to stderr: stdout is for results."""
    try:
        sys.stdout.flush()
        kept = os.dup(1)
    except (OSError, ValueError, AttributeError):  # there is none
        yield
        return
    try:
        os.dup2(2, 1)
        yield
    finally:
        with contextlib.suppress(OSError, TypeError, AttributeError):
            ctypes.CDLL(None).fflush(None)  # what C's library still holds
        os.dup2(kept, 1)
        os.close(kept)
