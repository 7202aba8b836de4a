"""The runs of this machine: those it remembers and those in `./runs`; listing, reading and deleting them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgetune.errors import InputError
from edgetune.files import delete_folder, folder_size, read_json
from edgetune.leases import forget_run, remembered_runs, users
from edgetune.run import FOLDERS, MANIFEST, RunFolder

RECIPE = "recipe.json"


@dataclass(frozen=True)
class Run:
    """One run folder, as it stands."""

    path: Path
    base: Path | None
    stages: list[str]  # those that are done; verify and bench where they measured the artifact that lies there
    passed: bool | None  # the gate; None before it was asked
    size: int  # bytes
    changed: str  # when something was last finished, ISO 8601

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "name": self.name,
            "path": str(self.path),
            "base": None if self.base is None else str(self.base),
            "stages": self.stages,
            "passed": self.passed,
            "size_mb": round(self.size / 1e6, 1),
            "changed": self.changed,
        }


def is_run(path: Path) -> bool:
    """Whether `path` is a run's folder and no link: it holds the resolved recipe of the run."""
    if path.is_symlink() or not (path / RECIPE).is_file():
        return False
    try:
        recipe = read_json(path / RECIPE)
    except InputError:
        return False
    return isinstance(recipe, dict) and {"model", "data"} <= recipe.keys()


def known_runs() -> list[Run]:
    """The remembered runs and those in `./runs`, the last changed first."""
    bases = {run.path: run.base for run in remembered_runs()}
    here = Path("runs")
    if here.is_dir():
        for path in here.iterdir():
            bases.setdefault(path.resolve(), None)
    runs = []
    for path, base in bases.items():
        with contextlib.suppress(OSError):  # gone since it was listed, or not ours to read
            if is_run(path) and not path.name.startswith("."):
                runs.append(_describe(path, base))
    return sorted(runs, key=lambda run: run.changed, reverse=True)


def _describe(path: Path, base: Path | None) -> Run:
    stages = [stage for stage in FOLDERS if _done(path, stage)]
    manifests = [RunFolder(path).output(stage) / MANIFEST for stage in stages]
    passed = _report(path, "verify").get("passed") if "verify" in stages else None
    changed = max(file.stat().st_mtime for file in [path / RECIPE, *manifests])
    return Run(
        path=path,
        base=base,
        stages=stages,
        passed=passed if isinstance(passed, bool) else None,
        size=folder_size(path),
        changed=datetime.fromtimestamp(changed, UTC).isoformat(timespec="seconds"),
    )


def _done(path: Path, stage: str) -> bool:
    """Whether the stage is done; one that measures the artifact, whether it measured the one that lies there."""
    run = RunFolder(path)
    folder = run.output(stage)
    if not (folder / MANIFEST).is_file():
        return False
    return stage not in ("verify", "bench") or run.is_of_artifact(stage)


def _report(path: Path, stage: str) -> dict[str, Any]:
    with contextlib.suppress(InputError):
        found = RunFolder(path).report(stage)
        return found if isinstance(found, dict) else {}
    return {}


def reports(run: Run) -> dict[str, dict[str, Any]]:
    """Stage → its report.json, of the stages that are done."""
    return {stage: report for stage in run.stages if (report := _report(run.path, stage))}


def numbers(report: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, bool | int | float]]:
    """The numbers of a report with dotted names: `("ttft_ms.p50", 41.2)`. Lists are left out."""
    for key, value in report.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{prefix}{key}.")
        elif isinstance(value, bool | int | float):
            yield f"{prefix}{key}", value


def as_text(value: bool | int | float) -> str:
    """A number as people read it: four significant digits, thousands apart."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"


def find_run(name: str) -> Run:
    """The run of that name (`edgetune runs ls`) or path.

    Raises InputError when there is none, when several have the name, when it is a link or no run folder.
    """
    path = Path(name).expanduser()
    bases = {run.path: run.base for run in remembered_runs()}
    if path.is_symlink():
        raise InputError("is a link, not a run folder", where=path, fix=f"name the folder itself: {path.resolve()}")
    if is_run(path):
        return _describe(path.resolve(), bases.get(path.resolve()))
    found = [run for run in known_runs() if run.name == name]
    if len(found) > 1:
        raise InputError(
            f"{len(found)} runs are called {name}",
            fix=f"name one by its path: {', '.join(str(r.path) for r in found)}",
        )
    if found:
        return found[0]
    if path.exists():
        raise InputError(
            f"is no run folder (there is no {RECIPE} in it)",
            where=path,
            fix="`edgetune runs ls` lists the runs",
        )
    names = ", ".join(run.name for run in known_runs()) or "none"
    raise InputError(f"no run {name}", fix=f"runs: {names}")


def users_of(run: Run) -> list[str]:
    """What still needs a run's folder: processes that use it, and runs built on a model inside it."""
    return users(run.path)


def remove_run(run: Run, *, force: bool = False) -> int:
    """Delete a run's folder and forget it; returns the bytes freed.

    Raises InputError while something uses it, unless `force`.
    """
    from filelock import FileLock, Timeout

    needed_by = users_of(run)
    if needed_by and not force:
        raise InputError(
            f"is still used by {', '.join(needed_by)}",
            where=run.path,
            fix="stop or remove that first, or use --force",
        )
    lock = FileLock(run.path / ".lock")  # held while it is deleted, so that no run starts in it
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        if not force:
            raise InputError(
                "another edgetune process works in it", where=run.path, fix="stop that first, or use --force"
            ) from error
    try:
        freed = delete_folder(run.path)
    finally:
        lock.release()
    forget_run(run.path)
    return freed
