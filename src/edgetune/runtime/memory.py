"""Memory of this process: its peak, what it gives back, and the size of its pages."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

_STATUS, _CLEAR_REFS, _SMAPS = (Path("/proc/self") / name for name in ("status", "clear_refs", "smaps"))
_HUGE = 2 << 20  # bytes of a huge page on x86-64, and on Arm with pages of 4 KB
_COLLAPSE = 25  # MADV_COLLAPSE of Linux' <linux/mman.h>
_LEAST, _RESIDENT = 4 * _HUGE, 0.9  # regions that are worth it: so large, and so much of it in memory


def peak_rss_mb() -> float:
    """Largest resident set of this process so far, in MB (10^6 bytes).

    On Linux since the last `reset_peak()`, elsewhere since the process started. Pages of files that are
    mapped into memory count, as model weights often are; the page cache of files that were merely read does
    not.
    """
    if sys.platform == "win32":
        import psutil

        return float(psutil.Process().memory_info().peak_wset) / 1e6
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6  # bytes on macOS, KiB on the other Unixes


def reset_peak() -> None:
    """Start the peak anew from what is resident now. Only Linux can; elsewhere nothing happens."""
    if os.name == "posix":
        with contextlib.suppress(OSError):  # not there outside Linux, not writable in some sandboxes
            _CLEAR_REFS.write_text("5", encoding="ascii")


def trim() -> None:
    """Give memory that was freed back to the system. Only glibc has to be asked; elsewhere nothing happens."""
    if sys.platform == "linux":
        import ctypes

        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def use_huge_pages() -> int:
    """Put the large resident regions of this process, weights above all, on pages of 2 MB.

    In decoding every weight is read once a token: with pages of 4 KB a large share of that is looking addresses up, above
    all in virtual machines, where each look-up is two. Nothing is allocated; what lies there is moved (madvise(2),
    MADV_COLLAPSE, Linux 6.1). Elsewhere, and where the system has no such pages free, nothing happens.

    Returns:
        Bytes of the regions that were moved.
    """
    if sys.platform != "linux":
        return 0
    import ctypes

    moved = 0
    with contextlib.suppress(OSError, AttributeError, ValueError):
        madvise = ctypes.CDLL(None).madvise
        for start, end in _large_regions():
            first, last = -(-start // _HUGE) * _HUGE, end // _HUGE * _HUGE
            if madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _COLLAPSE) == 0:
                moved += last - first
    return moved


def _large_regions() -> list[tuple[int, int]]:
    """Addresses of private, writable memory of no file that is large and resident."""
    found: list[tuple[int, int]] = []
    start = end = 0
    for line in _SMAPS.read_text(encoding="ascii", errors="replace").splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            bounds, _, rest = line.partition(" ")
            start, end = (int(part, 16) for part in bounds.split("-"))
            if not rest.startswith("rw-p") or (len(words) > 5 and words[5] != "[heap]"):
                end = start
        elif words[0] == "Rss:" and end - start >= _LEAST and int(words[1]) * 1024 >= _RESIDENT * (end - start):
            found.append((start, end))
    return found
