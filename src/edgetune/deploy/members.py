"""What one file that carries an artifact is made of, whichever kind it is: named byte ranges with their SHA-256.

Nothing in such a file is compressed, so that its bytes do not depend on the zlib at hand and each member is a range of
it. Reading is bounded: a header or a list that claims more than a few MB is refused before it is in memory.
"""

from __future__ import annotations

import builtins
import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from edgetune.errors import InputError
from edgetune.progress import Task

MANIFEST, SBOM = "manifest.json", "sbom.cdx.json"
MOST_MEMBERS = 10_000
MOST_BYTES = 16 << 20  # of a description that is read at once: a manifest, a list of members
_BLOCK = 4 << 20
_AGAIN = "copy or download it again, or make it again: edgetune package ARTIFACT"
# Names that are devices on Windows, and characters that no file name may have there.
_DEVICE = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")
_FORBIDDEN = re.compile(r'[\x00-\x1f<>:"\\|?*]')


@dataclass(frozen=True)
class Member:
    """One file of the artifact inside the file that carries it.

    Attributes:
        name: relative POSIX path in the artifact.
        offset: where its bytes begin.
        bytes: how many there are.
        sha256: hex, as the carrying file lists it.
    """

    name: str
    offset: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """A file of the artifact that is packed: its name there, its content, its size and hash."""

    name: str
    content: Path | builtins.bytes
    bytes: int
    sha256: str

    def blocks(self) -> Iterator[builtins.bytes]:
        """The content, a few MB at a time, checked at its end. Raises InputError when it is not what was listed."""
        found, size = hashlib.sha256(), 0
        for block in _read(self.content):
            found.update(block)
            size += len(block)
            yield block
        if (size, found.hexdigest()) != (self.bytes, self.sha256):
            raise InputError("changed while it was packed", where=self.name, fix="try again")


def source(name: str, content: bytes) -> Source:
    """A file that is made while packing."""
    return Source(name, content, len(content), hashlib.sha256(content).hexdigest())


def _read(content: Path | bytes) -> Iterator[bytes]:
    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        while block := file.read(_BLOCK):
            yield block


class Bounded(io.BufferedReader):
    """A file of which no more than `MOST_BYTES` are read at once, so that a false length cannot fill the memory."""

    def read(self, size: int | None = -1, /) -> bytes:
        """As BufferedReader does it. Raises InputError for more than `MOST_BYTES`."""
        if size is None or size < 0:
            here = self.tell()
            size = self.seek(0, io.SEEK_END) - here
            self.seek(here)
        if size > MOST_BYTES:
            raise broken(Path(str(self.name)), f"claims a description of {size:,} bytes")
        return super().read(size)


def bounded(file: Path) -> Bounded:
    """Open a file that may be hostile."""
    return Bounded(io.FileIO(file))


def broken(file: Path, what: str) -> InputError:
    """The error for a file that is not as `edgetune package` writes it."""
    return InputError(what, where=file, fix=_AGAIN)


def check_names(file: Path, names: Iterable[str]) -> None:
    """Refuse names that lead out of a folder, or that mean something else, or the same file, on some system."""
    seen: set[str] = set()
    for name in names:
        parts = name.split("/")
        if (
            _FORBIDDEN.search(name)
            or PurePosixPath(name).is_absolute()
            or any(part in ("", ".", "..") or part[-1] in " ." or _DEVICE.fullmatch(part) for part in parts)
            or any(len(part.encode(errors="replace")) > 255 for part in parts)
        ):
            raise broken(file, f"holds a file whose name is not safe: {name!r}")
        folded = name.casefold()
        if folded in seen:
            raise broken(file, f"holds {name!r} twice")
        seen.add(folded)


def blocks(file: BinaryIO, member: Member) -> Iterator[bytes]:
    """A member's bytes, a few MB at a time. Ends early where the file is cut short."""
    file.seek(member.offset)
    left = member.bytes
    while left > 0 and (block := file.read(min(left, _BLOCK))):
        left -= len(block)
        yield block


def check_content(path: Path, file: BinaryIO, member: Member, bar: Task | None = None) -> None:
    """Compare a member's bytes with its hash. Raises InputError."""
    found = hashlib.sha256()
    for block in blocks(file, member):
        found.update(block)
        if bar:
            bar.advance(len(block))
    if found.hexdigest() != member.sha256:
        raise broken(path, f"{member.name} is not what was packed: its SHA-256 differs")


def is_sha256(value: Any) -> bool:
    """Whether it is a hex SHA-256."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None
