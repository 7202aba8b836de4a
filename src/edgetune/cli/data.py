"""`edgetune data`."""

from __future__ import annotations

import typer

app = typer.Typer(help="Not written yet.", rich_markup_mode=None, no_args_is_help=True)


@app.command("ls")
def ls() -> None:
    """Not written yet."""
