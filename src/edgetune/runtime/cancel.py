"""Giving up what runs: who is asked, and the thread that asks while native code is busy."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Protocol

_LOOK_S = 0.02  # how often is looked whether to interrupt a native call


class Cancel(Protocol):
    """Says whether an answer is given up, as `threading.Event` does."""

    def is_set(self) -> bool: ...


class Either:
    """Set where one of two events is."""

    def __init__(self, one: Cancel, other: Cancel | None) -> None:
        self._events = (one,) if other is None else (one, other)

    def is_set(self) -> bool:
        """Whether one of them is."""
        return any(event.is_set() for event in self._events)


@contextlib.contextmanager
def watched(cancel: Cancel, interrupt: Callable[[], None]) -> Iterator[None]:
    """While the block runs, `interrupt` is called from another thread, once, when `cancel` is set."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_LOOK_S):
            if cancel.is_set():
                interrupt()
                return

    watcher = threading.Thread(target=watch, name="edgetune-cancel", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
