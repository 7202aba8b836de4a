"""Encoded rows on disk, mapped into memory: what the data stage encoded is not encoded again.

An entry is a folder of `home()/rows/`, named by the hash of all that decides its content: the prepared file, the
tokenizer with its chat template, `train_on` and the limit. It is renamed into place when it is whole, and used only if
each file has the hash that its manifest says. When there is more than `MOST_BYTES`, the entries that were not used
for longest go, whenever a new one is begun.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import tempfile
import time
import weakref
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, overload

from edgetune.data.render import Encoded
from edgetune.errors import InputError
from edgetune.files import (
    TMP_PREFIX,
    HashCache,
    delete_folder,
    digest,
    folder_size,
    home,
    read_json,
    replace_folder,
    write_json,
)
from edgetune.progress import say

if TYPE_CHECKING:
    import numpy as np

    from edgetune.data.parallel import Tokens

MANIFEST, FORMAT = "manifest.json", "edgetune/rows/1"
MOST_BYTES = 10_000_000_000
KEPT_S = 86_400.0  # what was used in the last day is kept in any case: a run may be about to need it
_BLOCK = 1 << 18  # tokens that are copied at once


class EncodedRows(Sequence[Encoded]):
    """Encoded rows whose tokens lie on disk and are mapped into memory; a slice is again such rows.

    Attributes:
        lengths: tokens of each row, int64, (rows,).
        learned_counts: tokens of each row on which the loss falls, int64, (rows,).
    """

    def __init__(
        self, tokens: np.ndarray, learned: np.ndarray, starts: np.ndarray, lengths: np.ndarray, counts: np.ndarray
    ) -> None:
        self.tokens, self.learned, self.starts = tokens, learned, starts
        self.lengths, self.learned_counts = lengths, counts
        self._whole: EncodedRows | None = None  # keeps the files there that a slice reads

    @classmethod
    def of(cls, folder: Path, rows: int, tokens: int, token_bytes: int) -> EncodedRows:
        """The rows in a folder. Raises OSError or ValueError where the files are not as long as that."""
        import numpy as np

        lengths = _map(folder / "lengths.bin", "<i8", rows)
        starts = np.zeros(rows, np.int64)
        np.cumsum(lengths[:-1], out=starts[1:])
        if rows and (int(lengths.min()) < 0 or int(starts[-1] + lengths[-1]) != tokens):
            raise ValueError(f"{folder}: the lengths do not add up to {tokens} tokens")
        return cls(
            _map(folder / "tokens.bin", f"<u{token_bytes}", tokens),
            _map(folder / "learned.bin", "u1", tokens),
            starts,
            lengths,
            _map(folder / "counts.bin", "<i8", rows),
        )

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...

    @overload
    def __getitem__(self, index: slice) -> EncodedRows: ...

    def __getitem__(self, index: int | slice) -> Encoded | EncodedRows:
        if isinstance(index, slice):
            parts = self.starts[index], self.lengths[index], self.learned_counts[index]
            some = EncodedRows(self.tokens, self.learned, *parts)
            some._whole = self._whole or self
            return some
        start = int(self.starts[index])
        end = start + int(self.lengths[index])
        return Encoded(self.tokens[start:end].tolist(), (self.learned[start:end] != 0).tolist())


def _map(path: Path, dtype: str, count: int) -> np.ndarray:
    import numpy as np

    size = count * np.dtype(dtype).itemsize
    if path.stat().st_size != size:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, {size} expected")
    # as plain arrays: a memmap makes every slice of it a memmap, slowly
    return np.asarray(np.memmap(path, dtype, "r")) if count else np.empty(0, dtype)


def rows_home() -> Path:
    """Where encoded rows are kept."""
    return home() / "rows"


def key(rows: str, tokenizer: str | None, train_on: str, limit: int | None) -> str | None:
    """The name of an entry; None where nothing can be kept.

    Args:
        rows: SHA-256 of the prepared file.
        tokenizer: its fingerprint.
        train_on, limit: of the recipe's data section.
    """
    if not possible(tokenizer):
        return None
    return digest({"format": FORMAT, "rows": rows, "tokenizer": tokenizer, "train_on": train_on, "limit": limit})


def possible(tokenizer: str | None) -> bool:
    """Whether rows can be kept: the tokenizer has a fingerprint, and the home can be written."""
    return tokenizer is not None and _writable(rows_home())


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def find(name: str | None) -> EncodedRows | None:
    """The entry of that name; None where there is none, or not as it was written."""
    folder = rows_home() / (name or "")
    if name is None or not folder.is_dir():
        return None
    try:
        manifest = read_json(folder / MANIFEST)
        if manifest["format"] == FORMAT and manifest["key"] == name and HashCache().folder(folder) == manifest["files"]:
            rows = EncodedRows.of(folder, manifest["rows"], manifest["tokens"], manifest["token_bytes"])
            with contextlib.suppress(OSError):
                os.utime(folder)  # tells when it was last used
            return rows
    except (InputError, OSError, KeyError, TypeError, ValueError):
        pass
    say("encoded rows are not as they were written; they are made again")
    return None


class Writer:
    """Takes encoded rows, one by one or from others, in a folder of its own until they are put into place.

    A context manager: what was not put into place vanishes with the block.
    """

    def __init__(self, token_bytes: int) -> None:
        root = rows_home() if _writable(rows_home()) else Path(tempfile.gettempdir())
        if root == rows_home():
            _clean(root)
        self._folder = root / f"{TMP_PREFIX}rows-{os.getpid()}-{secrets.token_hex(4)}"
        self._folder.mkdir(mode=0o700)
        self.token_bytes = token_bytes
        self._tokens, self._learned = (
            (self._folder / "tokens.bin").open("wb"),
            (self._folder / "learned.bin").open("wb"),
        )
        self._lengths, self._counts, self._done = array("q"), array("q"), False

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()
        if not self._done:
            shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, row: Tokens) -> None:
        """Add a row whose tokens have this writer's size."""
        self._tokens.write(row.ids)
        self._learned.write(row.learned)
        self._lengths.append(len(row.learned))
        self._counts.append(row.learned_count)

    def take(self, spool: Writer, chosen: np.ndarray) -> None:
        """Add the `chosen` rows (bool, one a row) of another writer, to which nothing is added any more."""
        import numpy as np

        # Read, not mapped: mapped pages would count as this process's memory.
        spool._close()
        lengths, counts = np.frombuffer(spool._lengths, np.int64), np.frombuffer(spool._counts, np.int64)
        ends = np.cumsum(lengths)
        with (spool._folder / "tokens.bin").open("rb") as tokens, (spool._folder / "learned.bin").open("rb") as learned:
            start = done = 0
            while start < len(lengths):
                end = max(start + 1, int(np.searchsorted(ends, done + _BLOCK, "right")))
                size, some = int(ends[end - 1]) - done, chosen[start:end]
                wanted = np.repeat(some, lengths[start:end])
                self._tokens.write(np.fromfile(tokens, f"<u{self.token_bytes}", size)[wanted].tobytes())
                self._learned.write(np.fromfile(learned, "u1", size)[wanted].tobytes())
                self._lengths.frombytes(lengths[start:end][some].tobytes())
                self._counts.frombytes(counts[start:end][some].tobytes())
                start, done = end, done + size

    def _close(self) -> None:
        self._tokens.close()
        self._learned.close()

    def rows(self) -> EncodedRows:
        """What was added, as it lies in the writer's folder; nothing can be added any more."""
        self._close()
        for name, values in (("lengths.bin", self._lengths), ("counts.bin", self._counts)):
            (self._folder / name).write_bytes(values.tobytes())
        return EncodedRows.of(self._folder, len(self._lengths), sum(self._lengths), self.token_bytes)

    def keep(self, name: str | None) -> EncodedRows:
        """Put the rows into place under `name` and return them; without a name they last as long as they are used."""
        rows = self.rows()
        self._done = True
        if name is None:
            weakref.finalize(rows, shutil.rmtree, self._folder, ignore_errors=True)
            return rows
        facts = {"rows": len(rows), "tokens": len(rows.tokens), "token_bytes": self.token_bytes}
        del rows  # Windows renames no folder with files that are mapped
        for file in self._folder.iterdir():
            with file.open("rb+") as handle:
                os.fsync(handle.fileno())
        entry, files = rows_home() / name, HashCache().folder(self._folder)
        write_json(self._folder / MANIFEST, {"format": FORMAT, "key": name, **facts, "files": files})
        try:
            replace_folder(self._folder, entry)
        except OSError:
            shutil.rmtree(self._folder, ignore_errors=True)
            if not entry.is_dir():  # else another process was as quick, with the same rows
                raise
        return EncodedRows.of(entry, **facts)


def keep(name: str | None, spool: Writer, chosen: np.ndarray) -> None:
    """Keep the `chosen` rows (bool, one a row) of a writer under `name`, unless they are kept already."""
    with locked(name):
        if name is None or find(name) is not None:
            return
        with Writer(spool.token_bytes) as writer:
            writer.take(spool, chosen)
            writer.keep(name)


_TEMPORARY = re.compile(re.escape(TMP_PREFIX) + r".+?-(\d+)-[0-9a-f]{8}(-deleted)?")


def _clean(root: Path) -> None:
    """Delete what dead processes left, and the entries that were not used for longest if there are too many."""
    import psutil

    entries: list[tuple[float, int, Path]] = []
    for path in root.iterdir():
        with contextlib.suppress(OSError):  # another process may be at it
            if found := _TEMPORARY.fullmatch(path.name):
                if not psutil.pid_exists(int(found[1])):
                    shutil.rmtree(path, ignore_errors=True)
            elif path.is_dir() and not path.is_symlink():
                entries.append((path.stat().st_mtime, folder_size(path), path))
    total = sum(size for _, size, _ in entries)
    for used, size, path in sorted(entries):
        if total <= MOST_BYTES or time.time() - used < KEPT_S:
            return
        with contextlib.suppress(OSError):
            delete_folder(path)
            total -= size


@contextlib.contextmanager
def locked(name: str | None) -> Iterator[None]:
    """Hold an entry's name, so that of several processes that need it one makes it and the others wait."""
    if name is None:
        yield
        return
    from filelock import FileLock

    locks = home() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / f"rows-{name[:2]}.lock"):  # two entries rarely share one, and there are 256 at most
        yield
