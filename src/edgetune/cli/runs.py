"""`edgetune runs`: the runs that were made on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from edgetune.cli._common import Json, megabytes, print_json, print_table

app = typer.Typer(
    help="The runs that were made on this machine: list, look at, delete.",
    epilog="Example: edgetune runs ls",
    rich_markup_mode=None,
    no_args_is_help=True,
)

Name = Annotated[str, typer.Argument(help="Name (`edgetune runs ls`) or folder of a run.")]

_GATE = {True: "passed", False: "NOT passed", None: "-"}


@app.command("ls")
def ls(json: Json = False) -> None:
    """List the runs that this machine remembers, and those in ./runs, the last changed first.

    \b
    Examples:
      edgetune runs ls
      edgetune runs ls --json
    """
    from edgetune import registry

    runs = registry.known_runs()
    if json:
        print_json([run.as_json() for run in runs])
    elif not runs:
        typer.echo("no runs yet; `edgetune run quickstart` makes one")
    else:
        print_table(
            ["name", "done", "gate", "size", "changed", "path"],
            [
                [
                    run.name,
                    " ".join(run.stages) or "nothing",
                    _GATE[run.passed],
                    megabytes(run.size),
                    run.changed,
                    str(run.path),
                ]
                for run in runs
            ],
        )


@app.command("show")
def show(name: Name, json: Json = False) -> None:
    """Show one run: what is done, the numbers that its stages reported, and the answers before and after training.

    \b
    Examples:
      edgetune runs show quickstart
      edgetune runs show runs/quickstart --json
    """
    from edgetune import registry

    run = registry.find_run(name)
    found = registry.reports(run)
    if json:
        print_json(run.as_json() | {"used_by": registry.users_of(run), "reports": found})
        return
    print_table(
        ["what", "value"],
        [
            ["name", run.name],
            ["path", str(run.path)],
            ["base", str(run.base or "not remembered")],
            ["done", " ".join(run.stages) or "nothing"],
            ["gate", _GATE[run.passed]],
            ["size", megabytes(run.size)],
            ["changed", run.changed],
            ["used by", ", ".join(registry.users_of(run)) or "-"],
            *(
                [f"{stage}: {key}", registry.as_text(value)]
                for stage, report in found.items()
                for key, value in registry.numbers(report)
            ),
        ],
    )
    if samples := found.get("train", {}).get("samples"):
        from edgetune.train.samples import as_text

        typer.echo(f"answers before and after training\n{as_text(samples)}")


@app.command("rm")
def rm(
    name: Name,
    force: Annotated[
        bool,
        typer.Option("--force", help="Delete it although a process uses it or another run is built on it."),
    ] = False,
    json: Json = False,
) -> None:
    """Delete a run's folder. Refused while a process uses it (a chat, a service, a run under way) or another
    run is built on it.

    \b
    Examples:
      edgetune runs rm quickstart
      edgetune runs rm runs/quickstart --force
    """
    from edgetune import registry

    run = registry.find_run(name)
    freed = registry.remove_run(run, force=force)
    if json:
        print_json({"deleted": str(run.path), "freed_mb": round(freed / 1e6, 1)})
    else:
        typer.echo(f"deleted {run.path}, {megabytes(freed)} freed")
