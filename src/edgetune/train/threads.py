"""How many CPU threads torch computes with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from edgetune.runtime.hardware import checked_threads


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """torch on `count` threads while the block runs, on its own choice when None.

    Raises:
        InputError: more threads than this machine can be asked for.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(checked_threads(count) if count else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
