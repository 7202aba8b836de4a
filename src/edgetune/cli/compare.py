"""`edgetune compare`: artifacts beside one another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgetune.cli._common import Json, print_json, print_table


def command(
    models: Annotated[
        list[Path],
        typer.Argument(
            metavar="MODEL...",
            help="Artifacts and runs; folders of other tools with genai_config.json.",
            show_default=False,
        ),
    ],
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure each now, in place of what the runs' reports say.")
    ] = False,
    against: Annotated[
        Path | None, typer.Option(metavar="MODEL", help="With --measure: the model that all are compared with.")
    ] = None,
    data: Annotated[Path | None, typer.Option(metavar="FILE", help="With --measure: held-out examples.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="With --measure: how many rows are compared.")] = None,
    step: Annotated[
        int | None,
        typer.Option(metavar="TOKENS", min=1, help="With --measure: feed rows this many tokens at a time."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder for compare.json and compare.png; none is written when not given."),
    ] = None,
    json: Json = False,
) -> None:
    """Put artifacts beside one another: size, divergence from the merged model, speed, memory.

    The numbers are those of the runs' own reports, or all measured now with --measure. A star marks what is
    Pareto-optimal in size, mean KL divergence and decode rate.

    \b
    Examples:
      edgetune compare runs/int8 runs/int4 --out comparison
      edgetune compare runs/int8 ./builder-int4 --measure --against runs/int8/merged --data rows.jsonl
    """
    from edgetune.errors import EdgetuneError, InputError
    from edgetune.export.compare import Measure, compare, table

    if measure and (against is None or data is None):
        raise InputError("--measure needs a model and rows", fix="add --against MODEL --data FILE")
    if not measure and any(value is not None for value in (against, data, rows, step)):
        raise InputError("--against, --data, --rows and --step are for --measure", fix="add --measure")
    how = Measure(against, data, rows, step) if measure and against and data else None
    found = compare(models, how, out)
    if json:
        print_json(found)
    else:
        print_table(*table(found))
        for note in found["notes"]:
            typer.echo(f"note: {note}")
        if out is not None:
            typer.echo(f"plot: {out / 'compare.png'}")
    if failed := [row["name"] for row in found["rows"] if row["error"]]:
        raise EdgetuneError(
            f"{len(failed)} of {len(found['rows'])} could not be measured: {', '.join(failed)}", fix="see above"
        )
