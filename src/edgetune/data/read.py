"""Files of examples to rows, each with the place where it stands."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from edgetune.data.problems import Problems, kind, quoted

if TYPE_CHECKING:
    from _csv import Reader

_BOM = b"\xef\xbb\xbf"
_KINDS = ".jsonl, .json, .csv or .parquet"
_SAVE_UTF8 = "save the file as UTF-8"
_PARQUET_ROWS = 256  # rows that are taken from a Parquet file at once
_PARQUET_BUFFER = 1 << 20  # bytes of a Parquet column that are read at once; else it is the whole row group


@dataclass(frozen=True)
class Row:
    """One row as it was read. `where` is `file:line`, or `file:row N` in files without lines."""

    values: dict[str, Any]
    where: str


def read(path: Path, problems: Problems, name: str | None = None) -> Iterator[Row]:
    """Read a .jsonl, .json, .csv or .parquet file.

    Args:
        path: the file.
        problems: takes what is wrong; reading goes on after it where it can.
        name: what the file is called in `where`; its own name when not given.

    Yields:
        the rows that could be read, in order. A .json file is read whole; of the others, a row or a batch of rows
        is in memory at a time.
    """
    readers = {".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if path.is_dir():
        problems.add(path, "is a folder, rows are read from a file", f"name the file: {_KINDS}")
    elif not path.exists():
        problems.add(path, "no such file", "check the path; in a recipe it is relative to the recipe's folder")
    elif reader is None:
        problems.add(path, f"`{path.suffix}` is not a kind of file that is read", f"use {_KINDS}")
    else:
        before, found = problems.count, False
        for row in reader(path, name or path.name, problems):
            found = True
            yield row
        if not found and problems.count == before:
            problems.add(path, "the file is empty: it has no rows", "add rows, or name another file")


def names(paths: list[Path]) -> list[str]:
    """Short names for files: the file name, with its folder's where two files share one."""
    plain = [path.name for path in dict.fromkeys(paths)]
    return [f"{p.parent.name}/{p.name}" if plain.count(p.name) > 1 else p.name for p in paths]


def _jsonl(path: Path, name: str, problems: Problems) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{name}:{number}"
            if number == 1:
                line = line.removeprefix(_BOM)
                if _is_utf16(line):
                    problems.add(path, "is UTF-16, not UTF-8", _SAVE_UTF8)
                    return
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode("utf-8"), parse_constant=_refuse)
            except UnicodeDecodeError as error:
                what = f"not UTF-8: byte {error.start + 1} of the line is 0x{line[error.start]:02x}"
                problems.add(where, what, _SAVE_UTF8)
            except json.JSONDecodeError as error:
                what = f"broken JSON: {_grammar(error)}"
                problems.add(where, what, "each line is one whole JSON object; correct or remove the line")
            except (ValueError, RecursionError) as error:
                problems.add(where, _odd(error), "correct or remove the line")
            else:
                if isinstance(value, dict):
                    yield Row(value, where)
                else:
                    problems.add(where, f"the row is {kind(value)}, not an object", _not_an_object(value))


def _not_an_object(value: object) -> str:
    if isinstance(value, list):
        return 'each line is one {"…": …}; a file that is one JSON list is named .json'
    return 'each line is one {"…": …}'


def _json(path: Path, name: str, problems: Problems) -> Iterator[Row]:
    text = _text(path, name, problems)
    if text is None or not text.strip():
        return
    constants: list[str] = []

    def constant(word: str) -> _Constant:
        constants.append(word)
        return _Constant(word)

    try:
        value = json.loads(text, parse_constant=constant)
    except json.JSONDecodeError as error:
        fix = "correct the file" if error.msg != "Extra data" else "a file with one object a line is named .jsonl"
        problems.add(f"{name}:{error.lineno}", f"broken JSON: {_grammar(error)}", fix)
        return
    except (ValueError, RecursionError) as error:
        problems.add(path, _odd(error), "correct the file")
        return
    if not isinstance(value, list):
        problems.add(path, f"the file is {kind(value)}, not a list of rows", "a .json file is one [ … ] of objects")
        return
    for number, item in enumerate(value, 1):
        where = f"{name}:row {number}"
        if not isinstance(item, dict):
            problems.add(where, f"the row is {kind(item)}, not an object", 'each row is one {"…": …}')
        elif constants and (word := _constant_in(item)):
            problems.add(where, f"{word} is not a JSON value", "write a number, a string or null")
        else:
            yield Row(item, where)


class _Constant(str):
    """NaN or Infinity, kept until it is known in which row it stands."""

    __slots__ = ()


def _constant_in(value: object) -> str | None:
    if isinstance(value, _Constant):
        return str(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((word for item in inner if (word := _constant_in(item))), None)


def _csv(path: Path, name: str, problems: Problems) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # the default refuses long answers; larger does not fit C's long on Windows
    with path.open("rb") as file:
        if _is_utf16(file.read(2)):
            problems.add(path, "is UTF-16, not UTF-8", _SAVE_UTF8)
            return
    with path.open(encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, strict=True)
        try:
            yield from _csv_rows(reader, name, problems)
        except UnicodeDecodeError:
            _name_bad_byte(path, name, problems)


def _csv_rows(reader: Reader, name: str, problems: Problems) -> Iterator[Row]:
    header: list[str] | None = None
    while True:
        where = f"{name}:{reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problems.add(where, f"broken CSV: {error}", 'quote cells with ", and write " inside them as ""')
            continue
        if not cells:
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            if not _good_header(header, where, problems):
                return
        elif len(cells) != len(header):
            what = f"the row has {_count(len(cells), 'cell')}, the header has {len(header)}"
            problems.add(where, what, "quote cells that hold commas or line breaks")
        else:
            yield Row(dict(zip(header, cells, strict=True)), where)


def _name_bad_byte(path: Path, name: str, problems: Problems) -> None:
    """Say where in a file the first byte stands that is not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(_BOM) if number == 1 else line
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                what = f"not UTF-8: byte {error.start + 1} of the line is 0x{line[error.start]:02x}"
                problems.add(f"{name}:{number}", what, _SAVE_UTF8)
                return


def _good_header(header: list[str], where: str, problems: Problems) -> bool:
    twice = [cell for cell in dict.fromkeys(header) if header.count(cell) > 1]
    if twice:
        problems.add(where, f"the header names {quoted(twice[0])} twice", "give each column a name of its own")
    elif len(header) == 1 and any(mark in header[0] for mark in ";\t"):
        problems.add(where, "the header has one column, the separator seems not to be a comma", "save it with commas")
        return False
    return not twice


def _parquet(path: Path, name: str, problems: Problems) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        problems.add(path, "reading Parquet needs pyarrow", "pip install 'edgetune[train]'")
        return
    if path.stat().st_size == 0:
        return
    try:
        number = 0
        with parquet.ParquetFile(path, buffer_size=_PARQUET_BUFFER) as file:
            for batch in file.iter_batches(_PARQUET_ROWS):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(values, f"{name}:row {number}")
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        first = (str(error).splitlines() or ["unknown"])[0]
        problems.add(path, f"not a whole Parquet file ({first})", "write the file again")


def _text(path: Path, name: str, problems: Problems) -> str | None:
    """The file as text without its byte order mark, or None with a problem noted."""
    data = path.read_bytes().removeprefix(_BOM)
    if _is_utf16(data):
        problems.add(path, "is UTF-16, not UTF-8", _SAVE_UTF8)
        return None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        _name_bad_byte(path, name, problems)
        return None


def _is_utf16(data: bytes) -> bool:
    return data.startswith((b"\xff\xfe", b"\xfe\xff"))


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a JSON value")


def _odd(error: ValueError | RecursionError) -> str:
    """JSON that the parser refuses for another reason than its grammar."""
    if isinstance(error, RecursionError):
        return "broken JSON: nested too deeply"
    return _lower(str(error).split(";")[0]) if "JSON" not in str(error) else str(error)


def _grammar(error: json.JSONDecodeError) -> str:
    return f"{_lower(error.msg.removesuffix(' at'))} at column {error.colno}"


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
