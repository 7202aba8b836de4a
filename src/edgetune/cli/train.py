"""`edgetune train`: fine-tune, and nothing after it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgetune.cli._common import Json, print_json, print_table
from edgetune.cli.run import Overrides, Recipe


def command(
    recipe: Recipe,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint of an interrupted training.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Train again although nothing changed.")] = False,
    nproc: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Train with N processes on each machine; with `train.distributed`, one a GPU when not given.",
            show_default=False,
        ),
    ] = None,
    hostfile: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Train on several machines, started through ssh: a line `HOST slots=N` for each, this one first.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Check the data and train the adapter of a recipe.

    Writes runs/NAME/adapter (peft's format) and runs/NAME/train (report.json, metrics.jsonl, loss.png).

    \b
    Examples:
      edgetune train quickstart
      edgetune train recipe.yaml train.epochs=3 name=longer
      edgetune train recipe.yaml --resume
      edgetune train recipe.yaml --nproc 4
      edgetune train zero3 --hostfile hosts.txt
      srun --ntasks-per-node=4 edgetune train several-machines
    """
    from edgetune.pipeline import Pipeline
    from edgetune.recipe_file import load
    from edgetune.summary import as_json, summary
    from edgetune.train import launch
    from edgetune.train.crew import find
    from edgetune.train.distributed import check

    loaded = load(recipe, overrides or [])
    section = loaded.recipe.train
    crew = find(section, nproc, hostfile)
    if crew:
        check(section, crew.size)
    if crew and not crew.leads:
        launch.follow(crew, section.threads)
        return
    with launch.leading(crew):
        pipeline = Pipeline(loaded, crew=crew)
        result = pipeline.run(until="train", first="train" if force else None, resume=resume)
    if json:
        print_json(as_json(result))
    else:
        print_table(("result", "value"), summary(result))
