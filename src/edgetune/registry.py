"""The runs of this machine: those it remembers and those in `./runs`; listing, reading and deleting them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgetune.errors import InputError
from edgetune.files import TMP_PREFIX, folder_size, read_json
from edgetune.leases import forget_run, holders, remembered_runs

RECIPE = "recipe.json"
# Folder that a stage is done with, in order.
STAGE_FOLDERS = {
    "data": "data",
    "train": "adapter",
    "merge": "merged",
    "export": "artifact",
    "verify": "verify",
    "bench": "bench",
}
REPORTS = ("data", "train", "merge", "export", "verify", "bench")


@dataclass(frozen=True)
class Run:
    """One run folder, as it stands."""

    path: Path
    base: Path | None
    stages: list[str]  # those that are done
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
    runs = [_describe(path, base) for path, base in bases.items() if is_run(path) and not path.name.startswith(".")]
    return sorted(runs, key=lambda run: run.changed, reverse=True)


def _describe(path: Path, base: Path | None) -> Run:
    manifests = {stage: path / folder / "manifest.json" for stage, folder in STAGE_FOLDERS.items()}
    done = {stage: file for stage, file in manifests.items() if file.is_file()}
    changed = max(file.stat().st_mtime for file in [path / RECIPE, *done.values()])
    passed = _report(path, "verify").get("passed")
    return Run(
        path=path,
        base=base,
        stages=list(done),
        passed=passed if isinstance(passed, bool) else None,
        size=folder_size(path),
        changed=datetime.fromtimestamp(changed, UTC).isoformat(timespec="seconds"),
    )


def _report(path: Path, stage: str) -> dict[str, Any]:
    with contextlib.suppress(InputError):
        found = read_json(path / stage / "report.json")
        return found if isinstance(found, dict) else {}
    return {}


def reports(run: Run) -> dict[str, dict[str, Any]]:
    """Stage → its report.json, of the stages that have one."""
    return {stage: report for stage in REPORTS if (report := _report(run.path, stage))}


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
    built = [
        f"run {other.path}"
        for other in remembered_runs()
        if other.base and other.path != run.path and other.base.is_relative_to(run.path)
    ]
    return [*(f"process {lease.pid} ({lease.what})" for lease in holders(run.path)), *built]


def remove_run(run: Run, *, force: bool = False) -> int:
    """Delete a run's folder and forget it; returns the bytes freed.

    Raises InputError while something uses it, unless `force`.
    """
    users = users_of(run)
    if users and not force:
        raise InputError(
            f"is still used by {', '.join(users)}",
            where=run.path,
            fix="stop or remove that first, or use --force",
        )
    freed = delete_folder(run.path)
    forget_run(run.path)
    return freed


def delete_folder(folder: Path) -> int:
    """Delete a folder, renamed first so that it is there whole or not at all. Returns the bytes freed."""
    import shutil

    size = folder_size(folder)
    trash = folder.with_name(f"{TMP_PREFIX}{folder.name}-deleted")
    if trash.exists():
        shutil.rmtree(trash)  # of a deletion that died
    folder.rename(trash)
    shutil.rmtree(trash)
    return size
