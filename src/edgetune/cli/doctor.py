"""`edgetune doctor`."""

from __future__ import annotations

import typer

from edgetune.cli._common import Json, print_json, print_table
from edgetune.errors import FAILED


def command(json: Json = False) -> None:
    """Say what is installed, what works together, what is missing, what this machine is, and which providers find a device.

    One line for each thing that is broken or missing, with the command that cures it. Exits with 1 where
    the runtime does not work or something that is installed is broken.

    \b
    Examples:
      edgetune doctor
      edgetune doctor --json
    """
    from edgetune.doctor import examine, machine_table, packages_table, remarks
    from edgetune.runtime.providers import table

    report = examine()
    if json:
        print_json(report)
    else:
        print_table(("package", "installed", "works with", "needed by"), packages_table(report))
        typer.echo()
        print_table(("machine", ""), machine_table(report))
        typer.echo()
        print_table(("provider", "on this machine", "what to do"), table(report["providers"]))
        typer.echo()
        for line in remarks(report):
            typer.echo(line)
    if not report["ok"]:
        raise typer.Exit(FAILED)
