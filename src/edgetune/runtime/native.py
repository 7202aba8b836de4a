"""The border to ONNX Runtime GenAI: its errors as ours."""

from __future__ import annotations

import contextlib
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
