"""The command line: a file a command; each parses, calls one function of a stage, and prints.

Nothing heavy is imported here: `edgetune --help` answers at once.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from edgetune import __version__
from edgetune.cli import (
    bench,
    chat,
    compare,
    data,
    doctor,
    evaluate,
    export,
    generate,
    heal,
    merge,
    models,
    package,
    plan,
    recipes,
    run,
    runs,
    serve,
    sweep,
    train,
    tune,
    unpack,
    verify,
)
from edgetune.cli._common import guarded, kept


class _Guarded(TyperGroup):
    """The root group: turns errors into one message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        with guarded():
            return super().invoke(ctx)


app = typer.Typer(
    name="edgetune",
    cls=_Guarded,
    help="From a pretrained language model and a file of examples to a checked, measured edge artifact.",
    epilog="Start with: edgetune run quickstart, then: edgetune chat runs/quickstart/artifact",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"edgetune {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """The options that stand before a command."""


_COMMANDS = (
    *(run, plan, sweep, train, merge, export, heal, verify, evaluate, bench, compare),
    *(tune, chat, generate, serve, package, unpack, doctor),
)
for _command in _COMMANDS:
    app.command(_command.__name__.rsplit(".", 1)[-1])(_command.command)
for _group in (recipes, data, models, runs):
    app.add_typer(_group.app, name=_group.__name__.rsplit(".", 1)[-1])


def _terminated(number: int, frame: Any) -> None:
    print(f"ended by {signal.Signals(number).name}; {kept()}", file=sys.stderr)
    sys.exit(128 + number)


def main() -> None:
    """Entry point of the `edgetune` command."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started us: read nothing, write nowhere
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115 - open as long as the process is
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows a ?, and no traceback
    for name in ("SIGTERM", "SIGHUP"):  # so that what is half-written is cleaned up, and children end
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _terminated)
    app()
