"""The run folder: how stages hand over to each other.

A stage owns one or two folders of the run. Each carries a `manifest.json` (format `edgetune/manifest/1`) that holds
a *key*, the digest of the stage's inputs and options, and the SHA-256 of every file beside it. A stage is fresh
when the key of what it would do now is the key of what stands there and every file is as it was written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgetune import __version__
from edgetune.errors import GateError, InputError
from edgetune.files import HashCache, digest, read_json, remove_leftovers, write_json

MANIFEST = "manifest.json"
FORMAT = "edgetune/manifest/1"

# Raised when a stage's code changes so that the same inputs and options give another result.
STAGE_VERSIONS = {"data": 1, "train": 1, "merge": 2, "export": 1, "verify": 1, "bench": 1}

# Folders of each stage; the last one is what people and later stages use.
FOLDERS = {
    "data": ("data",),
    "train": ("train", "adapter"),
    "merge": ("merge", "merged"),
    "export": ("export", "artifact"),
    "verify": ("verify",),
    "bench": ("bench",),
}

STAGES = tuple(FOLDERS)

# What only tells about the output is no part of what later stages depend on: the card has later measurements, reports have times.
NOT_CONTENT = frozenset({"README.md", "report.json", MANIFEST})


@dataclass(frozen=True)
class Work:
    """What a stage would do: its inputs (by content) and its options. Equal work has an equal key."""

    stage: str
    inputs: Mapping[str, Any]
    options: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Digest of stage, inputs and options."""
        return digest(
            {
                "stage": self.stage,
                "version": STAGE_VERSIONS[self.stage],
                "inputs": self.inputs,
                "options": self.options,
            }
        )


@dataclass
class Result:
    """What a run did.

    Attributes:
        path: the run folder.
        recipe: the recipe and its overrides, as arguments of a command line.
        done: for each stage why it was done, or None where it was fresh.
        reports: each stage's report.
        missed: what the gate said if a limit was missed; bench was not run then.
    """

    path: Path
    recipe: str
    done: dict[str, str | None] = field(default_factory=dict)
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)
    missed: GateError | None = None


class RunFolder:
    """One recipe's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hashes = HashCache()

    def folders(self, stage: str) -> tuple[Path, ...]:
        """The stage's folders, the last one being its output."""
        return tuple(self.path / name for name in FOLDERS[stage])

    def output(self, stage: str) -> Path:
        """The folder that later stages read."""
        return self.folders(stage)[-1]

    def report(self, stage: str) -> dict[str, Any]:
        """What the stage says of itself. Raises InputError when it is missing."""
        return read_json(self.folders(stage)[0] / "report.json")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run folder: one process at a time. Leftovers of dead ones are removed."""
        from filelock import FileLock, Timeout

        from edgetune.leases import lease

        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise InputError(
                "another edgetune process works in this run folder",
                where=self.path,
                fix="wait for it, stop it, or choose another run (`name=…`)",
            ) from error
        try:
            remove_leftovers(self.path)
            with lease(self.path, "edgetune run"):
                yield
        finally:
            self.hashes.save()
            lock.release()

    def stale(self, work: Work) -> str | None:
        """Why the stage must be done, or None when what stands there is what it would make."""
        for folder in self.folders(work.stage):
            if not folder.is_dir() or not (folder / MANIFEST).is_file():
                return "not done yet"
            found = read_manifest(folder)
            if found.get("key") != work.key:
                return _difference(found, work)
            hashes = self.hashes.folder(folder)
            outputs = {name: entry["sha256"] for name, entry in found.get("outputs", {}).items()}
            if hashes != outputs:
                changed = sorted(
                    name for name in outputs.keys() | hashes.keys() if outputs.get(name) != hashes.get(name)
                )
                return f"{folder.name}/{changed[0]} is not as it was written"
        return None

    def content(self, stage: str) -> str:
        """Digest of the stage's output: what a later stage depends on."""
        outputs = read_manifest(self.output(stage))["outputs"]
        return digest({name: entry["sha256"] for name, entry in outputs.items() if name not in NOT_CONTENT})

    def is_of_artifact(self, stage: str) -> bool:
        """Whether `verify` or `bench` is done, and measured the artifact that lies in the run now."""
        try:
            return bool(read_manifest(self.output(stage))["inputs"]["artifact"] == self.content("export"))
        except (KeyError, TypeError, AttributeError):  # a manifest that is missing or broken
            return False


def _difference(found: Mapping[str, Any], work: Work) -> str:
    for what in ("inputs", "options"):
        before, now = found.get(what, {}), getattr(work, what)
        names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        if names and what == "inputs":
            return f"its {names[0]} changed"
        if names:
            return f"{names[0]} changed from {_short(before.get(names[0]))} to {_short(now.get(names[0]))}"
    return "edgetune does this stage in another way now"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def seal(folder: Path, work: Work, **extra: Any) -> None:
    """Write `manifest.json` beside a stage's finished files.

    Args:
        folder: the (still staged) folder; every file in it is hashed.
        work: what was done.
        extra: further keys, such as the chain back to base model and data.
    """
    from edgetune.runtime.hardware import versions

    write_json(
        folder / MANIFEST,
        {
            "format": FORMAT,
            "stage": work.stage,
            "key": work.key,
            "edgetune": __version__,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "inputs": dict(work.inputs),
            "options": dict(work.options),
            **extra,
            "versions": versions(),
            "outputs": outputs(folder),
        },
    )


def outputs(folder: Path) -> dict[str, dict[str, Any]]:
    """Relative name → SHA-256 and size in bytes of every visible file below `folder` but the manifest."""
    hashes = HashCache().folder(folder)
    return {name: {"sha256": value, "bytes": (folder / name).stat().st_size} for name, value in hashes.items()}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, `{}` when it is broken or of another format (the stage is then done anew)."""
    try:
        found = read_json(folder / MANIFEST)
    except InputError:
        return {}
    return found if isinstance(found, dict) and found.get("format") == FORMAT else {}
