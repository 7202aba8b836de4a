"""What every command shares: errors to exit codes, JSON output, tables."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from edgetune.errors import FAILED, INTERRUPTED, EdgetuneError, InputError, from_system_error

if TYPE_CHECKING:
    from pydantic import BaseModel

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
NoProfile = Annotated[
    bool, typer.Option("--no-profile", help="Leave aside what `edgetune tune` measured on this machine.")
]

Section = TypeVar("Section", bound="BaseModel")

_kept = ["what was finished is kept"]


@contextlib.contextmanager
def kept_if_ended(text: str) -> Iterator[None]:
    """What is said of the work where a signal ends the block."""
    _kept.append(text)
    yield  # not undone by an exception: what says it comes after
    _kept.pop()


def kept() -> str:
    """What is left of the work, where a signal ends the command now."""
    return _kept[-1]


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Turn every error into one message on stderr and an exit code; a traceback only with EDGETUNE_DEBUG=1."""
    try:
        yield
    except EdgetuneError as error:
        _fail(error)
    except KeyboardInterrupt:
        print(f"interrupted; {kept()}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:  # the reader of a pipe went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(FAILED) from None
    except Exception as error:
        if type(error).__module__.split(".")[0] in {"typer", "click"}:
            raise  # usage errors and exits are the command line library's own
        known = from_system_error(error)
        if known is None:
            _crash()
        else:
            _fail(known)


def section_of(kind: type[Section], given: dict[str, Any], named: dict[str, str] | None = None) -> Section:
    """A part of the recipe from options; what is None is left to its default.

    Args:
        given: by the names that the recipe has them under.
        named: options that are called otherwise.

    Raises:
        InputError: a value that cannot be, with the option's name.
    """
    from pydantic import ValidationError

    try:
        return kind.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        names = [part for part in first["loc"] if isinstance(part, str)] or ["options"]
        what = f"{first['msg'][:1].lower()}{first['msg'][1:]}, not {first['input']!r}"
        raise InputError(what, where=option(names[-1], named), fix="see --help for what it takes") from error


def option(name: str, named: dict[str, str] | None = None) -> str:
    """The option that sets what the recipe calls so."""
    return f"--{(named or {}).get(name, name).replace('_', '-')}"


def _fail(error: EdgetuneError) -> None:
    print(f"error: {error.text()}", file=sys.stderr)
    if os.environ.get("EDGETUNE_DEBUG"):
        traceback.print_exc()
    raise typer.Exit(error.exit_code) from None


def _crash() -> None:
    kind, value, _ = sys.exc_info()
    text = traceback.format_exc()
    name = kind.__name__ if kind else "error"
    first = str(value).strip().splitlines()[0] if str(value).strip() else "no message"
    print(f"error: unexpected {name}: {first}", file=sys.stderr)
    if os.environ.get("EDGETUNE_DEBUG"):
        print(text, file=sys.stderr)
    else:
        with tempfile.NamedTemporaryFile("w", prefix="edgetune-", suffix=".log", delete=False, encoding="utf-8") as log:
            log.write(text)
        print(f"  fix: this is a fault of edgetune; please report it with {log.name}", file=sys.stderr)
    raise typer.Exit(FAILED) from None


def print_json(value: Any) -> None:
    """Print a result as JSON on stdout."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=_plain))


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """Print a table on stdout: ruled on a terminal, plain columns elsewhere."""
    if sys.stdout.isatty():
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*columns, title=title, box=box.SIMPLE_HEAD, title_justify="left")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        Console().print(table)
        return
    if title:
        typer.echo(title)
    widths = [
        max(len(column), *(len(row[i]) for row in rows), 0) if rows else len(column) for i, column in enumerate(columns)
    ]
    for line in [columns, *rows]:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def megabytes(size: float) -> str:
    """Bytes as `1,234.5 MB`."""
    return f"{size / 1e6:,.1f} MB"
