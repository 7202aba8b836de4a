"""An artifact as a zip: stored entries under one folder, `SHA256SUMS` first.

`unzip` and `sha256sum -c SHA256SUMS` are enough to open and check it. APPNOTE.TXT 6.3 describes the format; entries of
2 GiB and more use its zip64 fields.
"""

from __future__ import annotations

import re
import stat
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from edgetune.deploy.members import MOST_BYTES, MOST_MEMBERS, Member, Source, bounded, broken, source
from edgetune.progress import Task

MAGIC = b"PK\x03\x04"
SUMS = "SHA256SUMS"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can say
_UNIX = 3
_LOCAL_HEADER = 30  # bytes before an entry's name


def write(out: BinaryIO, root: str, files: Sequence[Source], bar: Task) -> None:
    """Write the zip. `root` is the folder inside it."""
    sums = "".join(f"{file.sha256}  {file.name}\n" for file in files)
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED, strict_timestamps=True) as packed:
        for file in [source(SUMS, sums.encode()), *files]:
            entry = zipfile.ZipInfo(f"{root}/{file.name}", _EPOCH)
            entry.create_system = _UNIX
            entry.external_attr = (stat.S_IFREG | 0o644) << 16
            entry.file_size = file.bytes  # decides whether zip64 is used
            with packed.open(entry, "w") as inside:
                for block in file.blocks():
                    inside.write(block)
                    bar.advance(len(block))


def read(path: Path) -> list[Member]:
    """The members that a zip lists, as far as its own structure goes; contents are not read.

    Raises:
        InputError: it is no zip as `write` makes it.
    """
    size = path.stat().st_size
    with bounded(path) as file:
        try:
            with zipfile.ZipFile(file) as packed:
                entries = packed.infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, OSError) as error:
            raise broken(path, f"is a damaged zip, or one cut short ({error})") from error
        if not entries or not (first := re.fullmatch(rf"([^/]+)/{SUMS}", entries[0].filename)):
            raise broken(path, f"is a zip, but no packed artifact: {SUMS} does not come first")
        _check(path, entries, size)
        offsets = [_offset(path, file, entry) for entry in entries]
        if any(offset + entry.file_size > size for offset, entry in zip(offsets, entries, strict=True)):
            raise broken(path, "is cut short")
        file.seek(offsets[0])
        sums = _sums(path, file.read(entries[0].file_size))
    prefix = f"{first[1]}/"
    members = []
    for entry, offset in zip(entries[1:], offsets[1:], strict=True):
        name = entry.filename.removeprefix(prefix)
        if not entry.filename.startswith(prefix) or name not in sums:
            raise broken(path, f"holds {entry.filename!r}, which {SUMS} does not list")
        members.append(Member(name, offset, entry.file_size, sums[name]))
    if missing := sorted(sums.keys() - {member.name for member in members}):
        raise broken(path, f"lacks {missing[0]}, which {SUMS} lists")
    return members


def _check(path: Path, entries: list[zipfile.ZipInfo], size: int) -> None:
    """Refuse entries that are anything but stored regular files that fit into the zip one beside the other."""
    for entry in entries:
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if entry.orig_filename != entry.filename:
            raise broken(path, f"holds a file whose name is not safe: {entry.orig_filename!r}")
        if entry.is_dir() or kind not in (0, stat.S_IFREG):
            raise broken(path, f"{entry.filename} is not a regular file")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 0x1:
            raise broken(
                path, f"{entry.filename} is compressed or encrypted; edgetune package stores files as they are"
            )
    if len(entries) > MOST_MEMBERS or sum(entry.file_size for entry in entries) > size:
        raise broken(path, "claims more than it can hold")
    if entries[0].file_size > MOST_BYTES:
        raise broken(path, f"claims a {SUMS} of {entries[0].file_size:,} bytes")


def _offset(path: Path, file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin: behind its local header, whose name must be the same."""
    file.seek(entry.header_offset)
    head = file.read(_LOCAL_HEADER)
    if len(head) < _LOCAL_HEADER or head[:4] != MAGIC:
        raise broken(path, f"{entry.filename} does not lie where the zip says")
    name, extra = int.from_bytes(head[26:28], "little"), int.from_bytes(head[28:30], "little")
    if file.read(name) != entry.filename.encode("utf-8" if entry.flag_bits & 0x800 else "cp437"):
        raise broken(path, f"{entry.filename} has two names")
    return entry.header_offset + _LOCAL_HEADER + name + extra


def _sums(path: Path, text: bytes) -> dict[str, str]:
    lines = text.decode("utf-8", errors="replace").splitlines()
    found = [re.fullmatch(r"([0-9a-f]{64})  (.+)", line) for line in lines]
    if not found or not all(found):
        raise broken(path, f"its {SUMS} is damaged")
    return {line[2]: line[1] for line in found if line}
