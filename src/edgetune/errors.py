"""The errors that a person meets: what is wrong, where, what to do, and the exit code.

Exit codes: 0 done, 1 failed, 2 wrong usage or input, 3 a gate was not passed, 130 interrupted.
"""

from __future__ import annotations

import errno
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

FAILED, WRONG_INPUT, GATE_NOT_PASSED, INTERRUPTED = 1, 2, 3, 130


class EdgetuneError(Exception):
    """A failure that is explained to the person at the keyboard, without a traceback.

    Args:
        what: what is wrong, one sentence.
        where: the place: `file:line`, a recipe key, a folder.
        fix: what to do about it.
    """

    exit_code = FAILED

    def __init__(self, what: str, *, where: str | Path | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, None if where is None else str(where), fix
        super().__init__(self.text())

    def text(self) -> str:
        """The message: `where: what`, then the cure on a line of its own."""
        first = f"{self.where}: {self.what}" if self.where else self.what
        return f"{first}\n  fix: {self.fix}" if self.fix else first


class InputError(EdgetuneError):
    """The input or the usage is wrong (exit 2)."""

    exit_code = WRONG_INPUT


class GateError(EdgetuneError):
    """The work is done, but what came of it does not meet a limit (exit 3)."""

    exit_code = GATE_NOT_PASSED


Extra = Literal["train", "export", "evaluate"]

_EXPORT = ("torch", "transformers", "safetensors", "onnx", "onnx_ir", "onnxscript")
# What the stages import of each optional extra of pyproject.toml.
EXTRAS: dict[Extra, tuple[str, ...]] = {
    "train": (
        "torch",
        "transformers",
        "peft",
        "accelerate",
        "safetensors",
        "gguf",
        "pyarrow",
        "matplotlib",
    ),
    "export": _EXPORT,
    "evaluate": (*_EXPORT, "lm_eval"),
}


def need(*packages: str, extra: Extra = "train") -> None:
    """Raise InputError when one of these packages, which `edgetune[extra]` brings, is not installed."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise InputError(f"{', '.join(missing)} {verb} not installed", fix=f"pip install 'edgetune[{extra}]'")


def require_extra(extra: Extra) -> None:
    """Raise InputError, naming what is missing, unless all of `edgetune[extra]` is installed. Nothing is imported."""
    need(*EXTRAS[extra], extra=extra)


def first_line(error: Exception) -> str:
    """The first line of what an error says, its type when it says nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{lines[0]} is missing" if isinstance(error, KeyError) else lines[0]


# How libraries that write files themselves (safetensors, torch) word a full disk.
_FULL = ("No space left on device", "os error 28", "inline_container.cc", "Disk quota exceeded")
# How torch words that the system gives it no memory.
_NO_MEMORY = ("DefaultCPUAllocator", "can't allocate memory", "not enough memory")


def from_system_error(error: Exception) -> EdgetuneError | None:
    """Explain an operating system's refusal (full disk, no memory, no permission, …), or None if it is another error.

    Args:
        error: what Python, or a library that writes files or takes memory, raised.
    """
    where = getattr(error, "filename", None) or getattr(error, "filename2", None)
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(text in str(error) for text in _FULL):
        return InputError(
            "the disk is full; nothing was left half-written",
            where=where,
            fix="free some space (`edgetune runs ls`, `edgetune models ls` show sizes) and run it again",
        )
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)
    ):
        return InputError("not enough memory", fix="lower train.batch_size or data.max_length, or close other programs")
    if not isinstance(error, OSError):
        return None
    if error.errno == errno.ENAMETOOLONG:
        return InputError("the name is too long", where=where, fix="choose a shorter name or path")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return InputError("no permission", where=where, fix="check the owner and mode, or choose another folder")
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError | FileExistsError):
        return InputError((error.strerror or "file error").lower(), where=where, fix="check the path")
    return None
