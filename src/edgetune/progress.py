"""Progress on stderr: what is done, how far it is, how long it still takes.

Bars only where stdout and stderr are both terminals; elsewhere a plain line at the start, one every ten
seconds, and one at the end. stdout is left to results.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import Protocol

_EVERY_S = 10.0


class Task(Protocol):
    """One piece of work that is under way."""

    def advance(self, steps: float = 1, note: str = "") -> None:
        """Say that `steps` more are done; `note` is a short remark such as `loss 1.23`."""

    def total(self, steps: float) -> None:
        """Set or correct the number of steps."""


def interactive() -> bool:
    """Whether bars and colour are wanted: stdout and stderr are terminals and NO_COLOR is not set."""
    return sys.stdout.isatty() and sys.stderr.isatty() and not os.environ.get("NO_COLOR")


def say(text: str) -> None:
    """One line for the person, on stderr."""
    print(text, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Seconds as people read them: `8 s`, `2 min 05 s`, `1 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class _Lines:
    def __init__(self, what: str, steps: float | None) -> None:
        self._what, self._total, self._done, self._note = what, steps, 0.0, ""
        self._start = self._said = time.monotonic()
        say(f"{what} …")

    def total(self, steps: float) -> None:
        self._total = steps

    def advance(self, steps: float = 1, note: str = "") -> None:
        self._done += steps
        self._note = note or self._note
        now = time.monotonic()
        if now - self._said < _EVERY_S:
            return
        self._said = now
        parts = [self._what]
        if self._total:
            share = min(self._done / self._total, 1.0)
            parts.append(f"{share:.0%}")
            if share > 0:
                parts.append(f"{clock((now - self._start) * (1 - share) / share)} left")
        else:
            parts.append(clock(now - self._start))
        say(", ".join([*parts, self._note] if self._note else parts))

    def close(self, ok: bool) -> None:
        took = clock(time.monotonic() - self._start)
        say(
            f"{self._what}: {'done in' if ok else 'stopped after'} {took}{', ' + self._note if self._note and ok else ''}"
        )


@contextlib.contextmanager
def task(what: str, total: float | None = None) -> Iterator[Task]:
    """Show one piece of work.

    Args:
        what: its name, as the person reads it: `train`, `reading rows`.
        total: number of steps, or None while it is not known.
    """
    if not interactive():
        lines = _Lines(what, total)
        try:
            yield lines
        except BaseException:
            lines.close(ok=False)
            raise
        lines.close(ok=True)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<24}"),
        BarColumn(28),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as shown:
        handle = shown.add_task(what, total=total, note="")

        class Bar:
            def total(self, steps: float) -> None:
                shown.update(handle, total=steps)

            def advance(self, steps: float = 1, note: str = "") -> None:
                shown.update(handle, advance=steps)
                if note:
                    shown.update(handle, note=note)

        yield Bar()
        done = shown.tasks[0]
        shown.update(handle, total=done.total or 1, completed=done.total or 1)
