"""Who uses what: small files in `home()/leases/` of living processes, asked before anything is deleted.

Here too: which run is built on which base model, remembered in `home()/runs.json`. The runtime imports this,
so nothing heavy is imported here.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from edgetune.files import home, write_json

# A process's start time is read with the clock's own granularity; two readings may differ by rounding.
_SAME_START_S = 1.0


@dataclass(frozen=True)
class Lease:
    """One process's use of a path.

    Attributes:
        pid: the process.
        started: when that process started, seconds since the epoch; tells a reused pid.
        path: absolute path that is used.
        what: the command, as the person knows it: `edgetune serve`.
    """

    pid: int
    started: float
    path: str
    what: str

    def alive(self) -> bool:
        """Whether the process that wrote this lease still runs."""
        try:
            process = psutil.Process(self.pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            return abs(process.create_time() - self.started) < _SAME_START_S
        except psutil.NoSuchProcess:
            return False
        except psutil.AccessDenied:
            return True  # it exists and is not ours to look at: rather keep than delete


@contextlib.contextmanager
def lease(path: Path, what: str) -> Iterator[None]:
    """Say that this process uses `path` (a file or a folder with all in it) while the block runs.

    A home that cannot be written is no error: a device with a read-only disk can still serve.

    Args:
        path: what is used.
        what: the command, as a refusal to delete `path` names it: `edgetune serve`.
    """
    pid = os.getpid()
    file = home() / "leases" / f"{pid}-{secrets.token_hex(4)}.json"
    with contextlib.suppress(OSError):
        write_json(file, asdict(Lease(pid, psutil.Process(pid).create_time(), str(path.resolve()), what)))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)


def holders(path: Path) -> list[Lease]:
    """Leases of living processes on `path`, on something inside it, or on a folder that it lies in.

    Leases of dead processes are deleted on the way.
    """
    wanted = path.resolve()
    found = []
    for file in sorted((home() / "leases").glob("*.json")):
        known = _read(file)
        if known is None:
            continue
        if not known.alive():
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
            continue
        used = Path(known.path)
        if used == wanted or used.is_relative_to(wanted) or wanted.is_relative_to(used):
            found.append(known)
    return found


def _read(file: Path) -> Lease | None:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        return Lease(int(value["pid"]), float(value["started"]), str(value["path"]), str(value["what"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # gone since it was listed, or not one of ours


@dataclass(frozen=True)
class Remembered:
    """A run that was started here: its folder, and the folder of the base model that it is built on."""

    path: Path
    base: Path | None


def remember_run(path: Path, base: Path | None) -> None:
    """Remember that the run in `path` is built on the model in folder `base`; the latest call counts."""
    with contextlib.suppress(PermissionError), _registry() as runs:  # a convenience: the run does not rest on it
        runs[str(path.resolve())] = {"base": str(base.resolve()) if base else None}


def remembered_runs() -> list[Remembered]:
    """All remembered runs whose folder still exists, by path."""
    return [
        Remembered(Path(path), Path(entry["base"]) if entry.get("base") else None)
        for path, entry in sorted(_read_runs().items())
    ]


def _read_runs() -> dict[str, dict[str, Any]]:
    try:
        found = json.loads((home() / "runs.json").read_text(encoding="utf-8"))
        return {path: dict(entry) for path, entry in found.items() if Path(path).is_dir()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # none yet, or written by hand: it is a convenience, not a result


@contextlib.contextmanager
def _registry() -> Iterator[dict[str, dict[str, Any]]]:
    from filelock import FileLock

    folder = home()
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "runs.json.lock"):
        runs = _read_runs()
        yield runs
        write_json(folder / "runs.json", runs)


def users(folder: Path) -> list[str]:
    """What still needs `folder`: `run PATH`, built on a model in it, and `process PID (COMMAND)`."""
    folder = folder.resolve()
    runs = [
        f"run {run.path}"
        for run in remembered_runs()
        if run.base and run.base.is_relative_to(folder) and run.path != folder
    ]
    return [*runs, *(f"process {lease.pid} ({lease.what})" for lease in holders(folder))]


def forget_run(path: Path) -> None:
    """Remember the run in `path` no longer."""
    with _registry() as runs:
        runs.pop(str(path.resolve()), None)
