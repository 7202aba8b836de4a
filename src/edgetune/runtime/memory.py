"""Peak memory of this process, without numpy or a background thread."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


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
