"""Models that edgetune keeps in `home()/models/`: one folder each, with a manifest that is written last.

A converted model lies in its folder. A hub model lies in the Hugging Face cache, where other programs find it
too; its folder here holds the manifest only, which says what a whole download consists of.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgetune.errors import InputError
from edgetune.files import TMP_PREFIX, delete_folder, home, read_json, staged_folder, write_json
from edgetune.leases import users
from edgetune.models.base import Base, file_hashes
from edgetune.progress import say

MANIFEST, FORMAT = "manifest.json", "edgetune/model/1"


def models_home() -> Path:
    """Where the models are kept."""
    return home() / "models"


def entry_for(name: str, sha: str) -> Path:
    """The folder of a model: its name, made safe for every file system, and the first 12 digits of a hash."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "model"
    return models_home() / f"{safe[:80]}-{sha[:12]}"


@contextlib.contextmanager
def locked(entry: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a model's entry: one process at a time makes or deletes it. Leftovers of dead ones are removed.

    Raises InputError when another holds it and `wait` is false.
    """
    from filelock import FileLock, Timeout

    locks = home() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    lock = FileLock(locks / f"{entry.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise InputError("another edgetune process is making this model", where=entry, fix="wait for it") from None
        say(f"another edgetune process is getting {entry.name}; waiting for it …")
        lock.acquire()
    try:
        _remove_leftovers(entry)
        yield
    finally:
        lock.release()


def _remove_leftovers(entry: Path) -> None:
    """Only this entry's: its lock is held, others' conversions may be under way."""
    ours = re.compile(re.escape(f"{TMP_PREFIX}{entry.name}-") + r"\d+-[0-9a-f]+")
    for path in entry.parent.glob(f"{TMP_PREFIX}*"):
        if ours.fullmatch(path.name) and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def seal(entry: Path, base: Base) -> None:
    """Write the manifest, the last file of an entry.

    Args:
        entry: the entry's folder, still staged.
        base: what it is; `base.path` is kept where the files lie elsewhere.
    """
    write_json(
        entry / MANIFEST,
        {
            "format": FORMAT,
            "id": base.id,
            "source": base.source,
            "revision": base.revision,
            "license": base.license,
            "upstream": base.upstream,
            "path": str(base.path) if base.source == "hub" else None,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "files": base.files,
        },
    )


def record(entry: Path, base: Base) -> None:
    """Keep the manifest of a model whose files lie in the Hugging Face cache."""
    with locked(entry), staged_folder(entry) as staged:
        seal(staged, base)


def lookup(entry: Path) -> Base | None:
    """The kept model, or None when there is none, or when a file is not as it was written."""
    manifest = _manifest(entry)
    if manifest is None:
        return None
    base = _base(entry, manifest)
    try:
        there = file_hashes(base.path)
    except OSError:
        return None
    if base.source == "hub":  # other programs may add files to the snapshot
        there = {name: value for name, value in there.items() if name in base.files}
    return base if there == base.files else None


def _manifest(entry: Path) -> dict[str, Any] | None:
    try:
        found = read_json(entry / MANIFEST)
    except InputError:
        return None
    whole = isinstance(found, dict) and found.get("format") == FORMAT and isinstance(found.get("files"), dict)
    return found if whole else None


def _base(entry: Path, manifest: dict[str, Any]) -> Base:
    return Base(
        path=Path(manifest["path"]) if manifest.get("path") else entry,
        id=manifest["id"],
        source=manifest["source"],
        revision=manifest.get("revision"),
        license=manifest.get("license"),
        files=manifest["files"],
        upstream=manifest.get("upstream"),
    )


@dataclass(frozen=True)
class Kept:
    """One kept model, for listing and deleting."""

    name: str
    entry: Path
    base: Base
    created: str
    size: int  # bytes of its files
    used_by: list[str]  # `run PATH` and `process PID (COMMAND)`

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        base = self.base
        return {
            "name": self.name,
            "id": base.id,
            "source": base.source,
            "upstream": base.upstream,
            "revision": base.revision,
            "license": base.license,
            "path": str(base.path),
            "size_mb": round(self.size / 1e6, 1),
            "created": self.created,
            "used_by": self.used_by,
            "files": base.files,
        }


def kept_models() -> list[Kept]:
    """All kept models, by name."""
    folder = models_home()
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []
    return [model for entry in entries if (model := _described(entry))]


def _described(entry: Path) -> Kept | None:
    manifest = _manifest(entry)
    if manifest is None:
        return None
    base = _base(entry, manifest)
    size = sum(path.stat().st_size for name in base.files if (path := base.path / name).is_file())
    return Kept(entry.name, entry, base, manifest["created"], size, users(base.path))


def find(name: str) -> Kept:
    """The kept model of that name, id, upstream id or path. Raises InputError unless there is exactly one."""
    models = kept_models()
    as_path = Path(name).expanduser().resolve()
    found = [m for m in models if name == m.name or as_path in (m.entry.resolve(), m.base.path.resolve())]
    found = found or [m for m in models if name in (m.base.id, m.base.upstream)]
    if len(found) > 1:
        raise InputError(
            f"{len(found)} models are meant by {name}", fix=f"name one: {', '.join(m.name for m in found)}"
        )
    if not found:
        known = ", ".join(m.name for m in models) or "none"
        raise InputError(f"no model {name} is kept here", where=models_home(), fix=f"kept models: {known}")
    return found[0]


def facts(base: Base) -> dict[str, Any]:
    """What config.json says of the model's shape, the keys that it has. Empty when the folder is gone."""
    try:
        config = read_json(base.path / "config.json")
    except InputError:
        return {}
    keys = (
        "model_type",
        "num_hidden_layers",
        "hidden_size",
        "vocab_size",
        "max_position_embeddings",
        "dtype",
    )
    return {key: config[key] for key in keys if key in config}


def remove(model: Kept, *, force: bool = False) -> int:
    """Delete a kept model and say how many bytes that freed.

    Raises InputError while a run is built on it or a process uses it, unless `force`.
    """
    if model.used_by and not force:
        raise InputError(
            f"is still used by {', '.join(model.used_by)}",
            where=model.name,
            fix="remove or stop that first, or use --force (a run that misses its base gets it again)",
        )
    with locked(model.entry, wait=False):
        freed = _remove_from_hub_cache(model.base) if model.base.source == "hub" else 0
        freed += delete_folder(model.entry)
    return freed


def _remove_from_hub_cache(base: Base) -> int:
    """Delete the commit from the Hugging Face cache; files that another commit shares stay."""
    if base.revision is None or base.path.parent.name != "snapshots" or not base.path.is_dir():
        return 0
    from huggingface_hub import scan_cache_dir

    strategy = scan_cache_dir(base.path.parents[2]).delete_revisions(base.revision)
    strategy.execute()
    return strategy.expected_freed_size
