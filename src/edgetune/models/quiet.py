"""Keeping the libraries' own bars and warnings off the terminal, and showing how far silent work is."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

from edgetune.files import folder_size
from edgetune.progress import Task


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Transformers and what it imports without progress bars, load reports and warnings while the block runs."""
    import torch
    from transformers.utils import logging

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, where installed, says on stdout what it chose
    getLogger("bitsandbytes").setLevel(ERROR)
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


class _NoBars:
    """Stands in for stderr: swallows tqdm's bars, lets everything else through."""

    def __init__(self, real: Any) -> None:
        self._real, self._in_bar = real, False

    def write(self, text: str) -> int:
        if re.search(r"\d+%\|", text):
            self._in_bar = True
        elif not (self._in_bar and not text.strip()):  # tqdm ends its line with a newline of its own
            self._in_bar = False
            self._real.write(text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


@contextlib.contextmanager
def bars_swallowed() -> Iterator[None]:
    """Keep off stderr the tqdm bars that transformers' own switch does not reach (GGUF's)."""
    with contextlib.redirect_stderr(_NoBars(sys.stderr)):
        yield


@contextlib.contextmanager
def paced(seconds: float, reached: Callable[[float], None]) -> Iterator[None]:
    """Call `reached` with the share (0 to 1) of the expected `seconds` that passed, for silent work."""
    stop, start = threading.Event(), time.monotonic()

    def tick() -> None:
        while not stop.wait(0.5):
            reached(min((time.monotonic() - start) / max(seconds, 0.1), 1.0))

    ticker = threading.Thread(target=tick, daemon=True)
    ticker.start()
    try:
        yield
    finally:
        stop.set()
        ticker.join()


@contextlib.contextmanager
def growth_shown(folder: Path, shown: Task) -> Iterator[None]:
    """Advance `shown` by the bytes that appear below `folder` while the block runs."""
    stop = threading.Event()

    def watch() -> None:
        before = seen = folder_size(folder)
        while not stop.wait(0.3):
            now = folder_size(folder)
            if now > seen:
                shown.advance(now - seen, f"{(now - before) / 1e6:,.0f} MB")
                seen = now

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()
