"""`edgetune sweep`: train a recipe with several values, compare, and merge the best."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetune.cli._common import Json, print_json, print_table
from edgetune.cli.run import Recipe, check_stage
from edgetune.errors import WRONG_INPUT

if TYPE_CHECKING:
    from edgetune.sweep import Sweep

Values = Annotated[
    list[str],
    typer.Argument(metavar="KEY=VALUE[,VALUE]...", help="Values for all points, and the grid.", show_default=False),
]


def command(
    recipe: Recipe,
    values: Values,
    until: Annotated[
        str, typer.Option(metavar="STAGE", help="How far the best point is carried on; `train` for no further.")
    ] = "merge",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the points with estimated times; train nothing.")
    ] = False,
    json: Json = False,
) -> None:
    """Train a recipe with every combination of values and compare them by validation loss. The best one is merged.

    A value is what stands between commas. Quote a comma that belongs to a value, and keep spaces away from the shell
    with quotes around the argument. [A,B] in brackets are values too, unless the key itself takes a list. Points lie in
    runs/NAME-sweep/, beside sweep.json and sweep.png. The same command goes on with a sweep that was interrupted. A
    point that fails does not end the others; the exit code is 1 then.

    \b
    Examples:
      edgetune sweep quickstart train.learning_rate=1e-4,2e-4,4e-4
      edgetune sweep recipe.yaml train.rank=8,16 train.learning_rate=1e-4,2e-4 train.epochs=2 name=grid
      edgetune sweep recipe.yaml 'train.target_modules=all-linear,[q_proj,v_proj]'
      edgetune sweep recipe.yaml 'data.train="a, b.jsonl",c.jsonl' 'seed=[1, 2, 3]'
      edgetune sweep recipe.yaml train.rank=8,16 --until bench
      edgetune sweep recipe.yaml train.rank=8,16 --dry-run
    """
    from edgetune import sweep as sweeping
    from edgetune.errors import InputError

    if check_stage(until) == "data":
        raise InputError("--until data compares nothing", fix="give train or a later stage")
    found = sweeping.read(recipe, values)
    if dry_run:
        _show_plan(sweeping.estimate(found), json)
        return
    sweeping.run(found, until)
    if not json:
        _show(found, ends=until == "train")
    result = None
    try:
        result = sweeping.carry_on(found, until)
    finally:
        if json:
            from edgetune.summary import as_json as told
            from edgetune.sweep_report import as_json

            print_json(as_json(found) | {"carried_on": told(result) if result else None})
    if result and not json:
        from edgetune.summary import summary

        print_table(("result", "value"), summary(result))
    sweeping.raise_for_failures(found)
    if result and result.missed:
        raise result.missed


def _show(found: Sweep, ends: bool) -> None:
    from edgetune.sweep_report import table

    columns, rows = table(found)
    print_table(columns, rows, title=f"{len(rows)} points in {found.folder}")
    if not found.comparable:
        typer.echo("warning: the points were validated on different rows or tokens: their losses do not compare")
    best = found.best()
    if best:
        typer.echo(f"best: {best.label} in {best.loaded.run_dir}")
        if ends:
            typer.echo(f"next: {best.command}")


def _show_plan(points: list[dict[str, Any]], json: bool) -> None:
    from edgetune.progress import clock
    from edgetune.sweep_report import shown

    if json:
        print_json(points)
    else:
        rows = [
            [
                " ".join(f"{key}={shown(value)}" for key, value in point["values"].items()),
                point["state"],
                "?" if point["seconds"] is None else f"about {clock(point['seconds'])}",
                point["run"],
            ]
            for point in points
        ]
        known = [point["seconds"] for point in points if point["seconds"] is not None]
        print_table(["point", "state", "time", "run"], rows)
        typer.echo(
            f"{len(points)} points" + (f", about {clock(sum(known))} in all" if len(known) == len(points) else "")
        )
        for problem in dict.fromkeys(problem for point in points for problem in point["problems"]):
            typer.echo(f"NOT OK {problem}")
    if any(point["problems"] for point in points):
        raise typer.Exit(WRONG_INPUT)
