"""`edgetune evaluate`: tasks of lm-evaluation-harness on an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgetune.cli._common import Json, print_json, print_table
from edgetune.cli._generation import Adapter


def command(
    artifact: Annotated[
        Path, typer.Argument(help="Artifact, run, any folder with a model, or a GGUF file.", show_default=False)
    ],
    tasks: Annotated[
        list[str],
        typer.Option(help="Task names with commas between, or a task's YAML file. Repeatable.", show_default=False),
    ],
    against: Annotated[
        Path | None,
        typer.Option(metavar="MODEL", help="A second model, such as the merged one: both columns are printed."),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder with tasks of your own, as YAML files.")
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option(min=0, help="Solved examples before each question; the task's own number if not given."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows of each task.")] = None,
    provider: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Where the artifact runs: cpu, openvino, …; what it was made for if not given."
        ),
    ] = None,
    adapter: Adapter = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the model's chat template.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="JSON file for the results.")] = None,
    json: Json = False,
) -> None:
    """Run tasks of lm-evaluation-harness on an artifact, and on the merged model beside it.

    \b
    Examples:
      edgetune evaluate runs/quickstart --tasks capitals --against runs/quickstart/merged
      edgetune evaluate ./artifact --tasks arc_easy,hellaswag --limit 100 --out results.json
      edgetune evaluate ./artifact --tasks mine.yaml --chat --against ./model.gguf
      edgetune evaluate skills --adapter sql --tasks mine.yaml --against runs/sql
    """
    from edgetune.export.evaluate import evaluate, table

    found = evaluate(
        artifact,
        against,
        tasks,
        include_path,
        shots=shots,
        limit=limit,
        chat=chat,
        provider=provider,
        adapter=adapter,
        out=out,
    )
    if json:
        print_json(found)
    else:
        print_table(*table(found))
