"""`edgetune train`: fine-tune, and nothing after it."""

from __future__ import annotations

from typing import Annotated

import typer

from edgetune.cli._common import Json, print_json, print_table
from edgetune.cli.run import HostFile, Overrides, Processes, Recipe, run_with


def command(
    recipe: Recipe,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint of an interrupted training.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Train again although nothing changed.")] = False,
    nproc: Processes = None,
    hostfile: HostFile = None,
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
    from edgetune.recipe_file import load
    from edgetune.summary import as_json, summary

    result = run_with(
        load(recipe, overrides or []), nproc, hostfile, until="train", first="train" if force else None, resume=resume
    )
    if result is None:
        return
    if json:
        print_json(as_json(result))
    else:
        print_table(("result", "value"), summary(result))
