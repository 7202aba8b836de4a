"""What the machine does while something is measured: other programs, frequency, energy, memory of a process."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_POWERCAP = Path("/sys/class/powercap")
_THROTTLED = "/sys/devices/system/cpu/cpu*/thermal_throttle/core_throttle_count"
_EVERY_S = 0.1
_MOST_POINTS = 600


def energy_uj() -> dict[str, tuple[int, int]] | None:
    """Counter and range in microjoules of each processor package (RAPL); None where the system does not tell.

    Linux lets only root read it on most machines.
    """
    found = {}
    for zone in sorted(_POWERCAP.glob("intel-rapl:*")):
        if zone.name.count(":") == 1:  # a package; its parts are counted in it
            with contextlib.suppress(OSError, ValueError):
                count = int((zone / "energy_uj").read_text())
                found[zone.name] = (count, int((zone / "max_energy_range_uj").read_text()))
    return found or None


def joules(before: dict[str, tuple[int, int]] | None, after: dict[str, tuple[int, int]] | None) -> float | None:
    """Energy between two readings; a counter that began anew meanwhile is taken to have done so once."""
    if not before or not after or before.keys() != after.keys():
        return None
    total = 0
    for name, (count, size) in after.items():
        gone = count - before[name][0]
        total += gone if gone >= 0 else gone + size
    return total / 1e6


def busy_s(own: Sequence[int]) -> float:
    """CPU seconds that all but these processes (by id) used since the machine started, other guests' included."""
    import psutil

    times = psutil.cpu_times()._asdict()
    resting = {"idle", "iowait", "guest", "guest_nice"}  # guests are part of user already
    used = sum(value for name, value in times.items() if name not in resting)
    for pid in own:
        with contextlib.suppress(psutil.Error):
            mine = psutil.Process(pid).cpu_times()
            used -= mine.user + mine.system
    return used


def frequency_mhz() -> float | None:
    """Mean frequency of the cores now; None where the system does not say."""
    import psutil

    with contextlib.suppress(OSError, AttributeError, NotImplementedError, RuntimeError):
        found = psutil.cpu_freq()
        return round(found.current, 1) if found and found.current else None
    return None


def throttled() -> int | None:
    """How often cores were slowed down for heat since the machine started; None where the system does not count."""
    counts = []
    for path in Path("/").glob(_THROTTLED[1:]):
        with contextlib.suppress(OSError, ValueError):
            counts.append(int(path.read_text()))
    return sum(counts) if counts else None


class Meter:
    """Adds up what happened during rounds: `with meter.round(): …`. Energy is that of the whole processor.

    Args:
        own: ids of the processes whose work is no disturbance.
    """

    def __init__(self, own: Sequence[int]) -> None:
        self._own = own
        self._wall = self._others = 0.0
        self._joules: float | None = 0.0
        self._frequencies: list[float] = []
        self._throttled = throttled()

    @contextlib.contextmanager
    def round(self, beside: Sequence[int] = ()) -> Any:
        """Add up one round. `beside`: processes that are busy on purpose meanwhile; they live as long as the block."""
        own = [*self._own, *beside]
        energy, busy, start = energy_uj(), busy_s(own), time.perf_counter()
        yield
        self._wall += time.perf_counter() - start
        self._others += busy_s(own) - busy
        spent = joules(energy, energy_uj())
        self._joules = None if spent is None or self._joules is None else self._joules + spent
        if (now := frequency_mhz()) is not None:
            self._frequencies.append(now)

    def result(self) -> dict[str, Any]:
        """others_busy_cores (None in under 0.2 s: the system counts in ticks of 10 ms), energy_j, frequency_mhz
        (min and max after rounds), throttled (how often); each None where the system does not tell."""
        others = max(0.0, round(self._others / self._wall, 2)) if self._wall > 0.2 else None
        span = {"min": min(self._frequencies), "max": max(self._frequencies)} if self._frequencies else None
        counted = throttled()
        hot = None if counted is None or self._throttled is None else counted - self._throttled
        energy = self._joules if self._wall else None
        return {
            "others_busy_cores": others,
            "energy_j": None if energy is None else round(energy, 3),
            "frequency_mhz": span,
            "throttled": hot,
        }


class MemoryCurve:
    """Resident memory of a process over time, read ten times a second by a thread of this one."""

    def __init__(self, pid: int) -> None:
        import psutil

        self._start = time.perf_counter()
        self._points: list[tuple[float, float]] = []
        self._marks: list[tuple[float, str]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(psutil.Process(pid),), daemon=True)
        self._thread.start()

    def mark(self, what: str) -> None:
        """Note that something begins now."""
        self._marks.append((round(time.perf_counter() - self._start, 2), what))

    def _watch(self, process: Any) -> None:
        import psutil

        with contextlib.suppress(psutil.Error):
            while True:
                used = process.memory_info().rss / 1e6
                self._points.append((round(time.perf_counter() - self._start, 2), round(used, 1)))
                if self._ended.wait(_EVERY_S):
                    return

    def stop(self) -> dict[str, Any]:
        """points: [seconds, MB], at most 600 of them, peaks kept; marks: [seconds, what]."""
        self._ended.set()
        self._thread.join()
        size = -(-len(self._points) // _MOST_POINTS) or 1
        groups = [self._points[i : i + size] for i in range(0, len(self._points), size)]
        highest = [max(group, key=_height) for group in groups]
        return {
            "points": [list(point) for point in highest],
            "marks": [list(m) for m in self._marks],
        }


def _height(point: tuple[float, float]) -> float:
    return point[1]
