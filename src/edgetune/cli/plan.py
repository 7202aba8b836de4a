"""`edgetune plan`: what a recipe will take on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from edgetune.cli._common import Json, print_json, print_table
from edgetune.cli.run import HostFile, Overrides, Processes, Recipe, check_stage, who_trains
from edgetune.errors import WRONG_INPUT

if TYPE_CHECKING:
    from edgetune.recipe_file import LoadedRecipe
    from edgetune.train.crew import Crew


def command(
    recipe: Recipe,
    overrides: Overrides = None,
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="Leave out what comes after this stage.")] = None,
    nproc: Processes = None,
    hostfile: HostFile = None,
    json: Json = False,
) -> None:
    """Say what a recipe takes on this machine: time, peak memory and disk of each stage, and whether it fits.

    Training is measured: three steps of the recipe's method on two shallow models of the same widths. Nothing of the
    run is written. Exit 2 if it does not fit.

    \b
    Examples:
      edgetune plan quickstart
      edgetune plan recipe.yaml model.id=./larger-model train.method=qlora
      edgetune plan recipe.yaml train.batch_tokens=4096 --until train
      edgetune plan recipe.yaml train.distributed.engine=fsdp --nproc 4
    """
    from edgetune.recipe_file import load

    loaded = load(recipe, overrides or [])
    crew = who_trains(loaded, nproc, hostfile)
    show(loaded, None, check_stage(until), False, json, crew, with_recipe=False)


def show(
    loaded: LoadedRecipe,
    first: str | None,
    until: str | None,
    force: bool,
    json: bool,
    crew: Crew | None,
    *,
    with_recipe: bool,
) -> None:
    """Print a plan; exit 2 if a check of it fails."""
    from edgetune.plan import plan, rows

    planned = plan(loaded, first=first, until=until, force=force, crew=crew)
    if json:
        print_json(planned)
    else:
        if with_recipe:
            import yaml

            typer.echo(yaml.safe_dump(planned["recipe"], sort_keys=False, allow_unicode=True, width=110))
        print_table(("stage", "what", "time", "memory", "disk"), rows(planned))
        for check in planned["checks"]:
            typer.echo(f"{'ok    ' if check['ok'] else 'NOT OK'} {check['what']}")
    if not all(check["ok"] for check in planned["checks"]):
        raise typer.Exit(WRONG_INPUT)
