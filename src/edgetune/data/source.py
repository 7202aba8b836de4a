"""One side's files of examples, read row by row as often as need be; what is remembered of a row is 40 bytes."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from edgetune.data.forms import find_form, normalize
from edgetune.data.problems import Problems, RowProblem
from edgetune.data.read import Row, read
from edgetune.errors import InputError
from edgetune.files import digest
from edgetune.progress import Task, task

if TYPE_CHECKING:
    import numpy as np

_STEP = 256  # rows between two updates of the progress
_KEY_BYTES = 16


class Normal(NamedTuple):
    """A normalized row: its number among the rows that were read (from 0), its values, and where it stands."""

    number: int
    values: dict[str, Any]
    where: str


@dataclass
class Source:
    """The files of one side.

    Attributes:
        files: each with what it is called in `file:line`.
        form: of all rows; None where there is no row, or none could be told.
        read: rows that could be read, by name of file.
    """

    files: list[tuple[Path, str]]
    form: str | None = None
    read: dict[str, int] = field(default_factory=dict)
    _stamps: dict[Path, tuple[int, int] | None] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Rows that could be read."""
        return sum(self.read.values())

    def survey(self, side: str, form: str, problems: Problems) -> None:
        """Read the files once: count the rows, tell their form (where `form` is `auto`), name what cannot be read."""
        with task(f"{side} rows") as shown:
            rows = self._surveyed(problems, shown)
            first = next(rows, None)
            if first is not None and form == "auto":
                self.form = find_form(_and_first(first, rows), problems)
            elif first is not None:
                self.form = form
                for _ in rows:
                    pass

    def _surveyed(self, problems: Problems, shown: Task) -> Iterator[Row]:
        for path, name in self.files:
            self._stamps[path] = _stamp(path)
            self.read.setdefault(name, 0)
            for row in read(path, problems, name):
                self.read[name] += 1
                yield row
                if self.read[name] % _STEP == 0:
                    shown.advance(0, note=f"{self.count:,} rows")
            shown.advance(note=f"{self.count:,} rows")

    def normalized(self, extra: Counter[str] | None = None, problems: Problems | None = None) -> Iterator[Normal]:
        """The rows in edgetune's one form, in order.

        Args:
            extra: counts the keys that are not used.
            problems: takes what is wrong with a row; what cannot be read was named by `survey`.

        Raises:
            InputError: a file is no longer what it was when it was surveyed.
        """
        if self.form is None:
            return
        extra, problems = Counter() if extra is None else extra, problems or Problems()
        number = -1
        for path, name in self.files:
            self._check_same(path)
            for row in read(path, Problems(), name):
                number += 1
                try:
                    values = normalize(row.values, self.form, extra)
                except RowProblem as problem:
                    problems.add(row.where, problem.what, problem.fix)
                    continue
                yield Normal(number, values, row.where)
            self._check_same(path)

    def _check_same(self, path: Path) -> None:
        if _stamp(path) != self._stamps[path]:
            raise InputError(
                "the file changed while it was read", where=path, fix="run it again when nothing writes to the file"
            )


def _and_first(first: Row, rest: Iterator[Row]) -> Iterator[Row]:
    yield first
    yield from rest


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


class Kept:
    """What is remembered of the rows that can be used, in their order."""

    def __init__(self) -> None:
        self._numbers, self._tokens, self._learned = array("q"), array("q"), array("q")
        self._keys = bytearray()

    def __len__(self) -> int:
        return len(self._numbers)

    def add(self, number: int, key: bytes, tokens: int, learned: int) -> None:
        """Remember a row: its number in its source, its key, its length before a cut, and what is learned of it."""
        self._numbers.append(number)
        self._keys += key
        self._tokens.append(tokens)
        self._learned.append(learned)

    def arrays(self) -> dict[str, np.ndarray]:
        """Views of shape (rows,): `numbers`, `tokens`, `learned` (int64), `keys` (16 bytes each)."""
        import numpy as np

        return {
            "numbers": np.frombuffer(self._numbers, np.int64),
            "tokens": np.frombuffer(self._tokens, np.int64),
            "learned": np.frombuffer(self._learned, np.int64),
            "keys": np.frombuffer(self._keys, f"S{_KEY_BYTES}"),
        }


def key(values: dict[str, Any]) -> bytes:
    """16 bytes that are equal for equal rows, whatever the order of their keys."""
    return bytes.fromhex(digest(values))[:_KEY_BYTES]


@dataclass
class Side:
    """The rows of the training or the validation side.

    Attributes:
        source: where they are read from.
        chosen: of the rows of that source that can be used, those on this side; bool, (usable rows,).
        numbers, tokens, learned, keys: of the rows on this side; see `Kept.arrays`. `tokens` is the length before
            a cut; without a tokenizer, `tokens` and `learned` count characters.
    """

    source: Source
    chosen: np.ndarray
    numbers: np.ndarray
    tokens: np.ndarray
    learned: np.ndarray
    keys: np.ndarray

    @classmethod
    def of(cls, source: Source, kept: Kept, chosen: np.ndarray) -> Side:
        """The `chosen` ones of a source's usable rows."""
        return cls(source, chosen, **{name: values[chosen] for name, values in kept.arrays().items()})

    def __len__(self) -> int:
        return len(self.numbers)

    def first(self) -> dict[str, Any] | None:
        """The values of the first row, read again; None where there is none."""
        wanted = int(self.numbers[0]) if len(self) else None
        return next((row.values for row in self.source.normalized() if row.number == wanted), None)
