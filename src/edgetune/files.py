"""Files that are whole or absent: atomic writes, staged folders, hashes.

Everything is written under a temporary name beside its place and renamed, so that a crash, a full disk,
Ctrl-C or a kill -9 leaves either the old file, the new one, or none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from edgetune.errors import InputError

TMP_PREFIX = ".tmp-"


def home() -> Path:
    """edgetune's own folder: models, encoded rows, leases, hash cache. `EDGETUNE_HOME`, else the user's cache folder."""
    if explicit := os.environ.get("EDGETUNE_HOME"):
        return Path(explicit).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None)
    return (Path(cache) if cache else Path.home() / ".cache") / "edgetune"


def _temporary(final: Path) -> Path:
    return final.parent / f"{TMP_PREFIX}{final.name}-{os.getpid()}-{secrets.token_hex(4)}"


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows has no handle for syncing a folder
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, all or nothing. Raises OSError, with the old file untouched."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a write that fails does not say which file it was
        raise


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 `text` to `path`, all or nothing."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON to `path`, all or nothing. NaN and infinity are refused (ValueError)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises InputError when it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError("no such file", where=path) from error
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, numbers or nesting without end
        raise InputError(f"not a JSON file ({error})", where=path) from error


@contextlib.contextmanager
def staged_file(final: Path) -> Iterator[Path]:
    """The path of a new file that takes `final`'s place, whole, when the block ends well, and vanishes when it does not."""
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(final)
    try:
        yield temporary
        temporary.replace(final)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """A new folder that takes `final`'s place, whole, when the block ends well, and vanishes when it does not."""
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(final)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file() and not file.is_symlink():
                with file.open("rb+") as handle:
                    os.fsync(handle.fileno())
        replace_folder(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def replace_folder(new: Path, final: Path) -> None:
    """Rename folder `new` to `final`, putting away what stood there. Killed between: `final` is absent, never mixed."""
    if final.is_symlink():
        raise InputError(
            "is a link; edgetune does not replace links",
            where=final,
            fix="remove it, or choose another folder",
        )
    if final.exists():
        trash = _temporary(final)
        final.rename(trash)
        new.rename(final)
        shutil.rmtree(trash, ignore_errors=True)
    else:
        new.rename(final)
    _sync_folder(final.parent)


def remove_leftovers(folder: Path) -> None:
    """Delete what dead processes left under temporary names in `folder`. Call it with the folder's lock held."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.name.startswith(TMP_PREFIX):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


_DELETED = re.compile(re.escape(TMP_PREFIX) + r".+-\d+-[0-9a-f]{8}-deleted")


def delete_folder(folder: Path) -> int:
    """Delete a folder, renamed first so that it is there whole or not at all. Returns the bytes freed.

    What a deletion that was killed left beside it is deleted too.
    """
    size = folder_size(folder)
    trash = _temporary(folder)
    trash = folder.rename(trash.with_name(f"{trash.name}-deleted"))
    for path in folder.parent.iterdir():
        if _DELETED.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)  # another process may be at it
    if trash.exists():
        shutil.rmtree(trash)  # says what hinders it
    return size


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """Hex SHA-256 of a JSON-like value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


_MOST_HASHES = 10_000  # about 1.3 MB of JSON; the oldest are forgotten first


class HashCache:
    """SHA-256 of files, remembered by inode, size and times, so that an unchanged file is read once.

    Renaming a folder changes none of these, so what is hashed while it is staged is known under its final name.
    Kept in `home()/hashes.json`. A file whose content changes without any of these changing is not noticed;
    loading an artifact therefore never uses this cache.
    """

    def __init__(self) -> None:
        self._path = home() / "hashes.json"
        self._new: dict[str, str] = {}

    @cached_property
    def _known(self) -> dict[str, str]:
        return self._read()

    def _read(self) -> dict[str, str]:
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            return {key: value for key, value in found.items() if isinstance(value, str)}
        except (OSError, ValueError, AttributeError):
            return {}  # none yet, or not ours: it is a convenience

    def file(self, path: Path) -> str:
        """Hex SHA-256 of `path`'s content. Raises OSError."""
        # The ctime, which nobody can set, tells a file that took over the inode of one that is gone.
        at = path.stat()
        key = f"{at.st_dev}-{at.st_ino}-{at.st_size}-{at.st_mtime_ns}-{at.st_ctime_ns}"
        known = self._new.get(key) or self._known.get(key)
        if known is None:
            known = self._new[key] = sha256_file(path)
        return known

    def folder(self, folder: Path, skip: tuple[str, ...] = ("manifest.json",)) -> dict[str, str]:
        """Relative POSIX path → SHA-256 of every visible file below `folder`, `skip` left out. Saves what it learned."""
        found = {}
        for path in sorted(folder.rglob("*")):
            relative = path.relative_to(folder)
            if path.is_file() and str(relative) not in skip and not any(p.startswith(".") for p in relative.parts):
                found[relative.as_posix()] = self.file(path)
        self.save()
        return found

    def save(self) -> None:
        """Add what was learned to what is kept. A cache that cannot be written, or is busy, is no error."""
        if not self._new:
            return
        from filelock import FileLock

        with contextlib.suppress(OSError):  # filelock's Timeout is one
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self._path}.lock", timeout=1):
                self._known = self._read() | self._new  # others may have saved since
                newest = list(self._known.items())[-_MOST_HASHES:]
                write_text(self._path, json.dumps(dict(newest)))
            self._new = {}


def folder_size(folder: Path) -> int:
    """Bytes of all regular files below `folder`, links not followed. What vanishes meanwhile does not count."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                found = Path(place, name).lstat()
                total += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return total


def existing(path: Path) -> Path:
    """`path`, or its nearest parent that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f}" if count >= 10_000_000 else f"{count / 1e6:.3f}"


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise InputError when the disk that holds `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(existing(folder)).free
    if free < needed:
        raise InputError(
            f"{what} needs about {_megabytes(needed)} MB of disk, {_megabytes(free)} MB are free",
            where=folder,
            fix="free some space, or choose a folder on another disk (`runs_dir=…`, EDGETUNE_HOME)",
        )
