"""`edgetune run`: a recipe becomes an edge artifact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetune.cli._common import Json, print_json, print_table

if TYPE_CHECKING:
    from edgetune.recipe_file import LoadedRecipe
    from edgetune.run import Result
    from edgetune.train.crew import Crew

Recipe = Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped recipe.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace the recipe's.", show_default=False),
]


Processes = Annotated[
    int | None,
    typer.Option(
        "--nproc",
        metavar="N",
        help="Train with N processes on each machine; with `train.distributed`, one a GPU when not given.",
        show_default=False,
    ),
]
HostFile = Annotated[
    Path | None,
    typer.Option(
        "--hostfile",
        metavar="FILE",
        help="Train on several machines, started through ssh: a line `HOST slots=N` for each, this one first.",
        show_default=False,
    ),
]


def command(
    recipe: Recipe,
    overrides: Overrides = None,
    first: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="STAGE",
            help="Redo this stage and those after it (data, train, merge, export, verify, bench).",
        ),
    ] = None,
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="Stop after this stage.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Redo every stage.")] = False,
    nproc: Processes = None,
    hostfile: HostFile = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Show recipe, stages, estimates and checks; write nothing. Exit 2 if a check fails."
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Run a recipe: data, train, merge, export, verify, bench.

    Only what changed is redone. Exit 3 when the artifact does not pass the gate.

    \b
    Examples:
      edgetune run quickstart
      edgetune run recipes/quickstart.yaml train.learning_rate=1e-4 name=slower
      edgetune run recipe.yaml model.id=./my-model export.target=cpu-fp32
      edgetune run recipe.yaml --from export
      edgetune run recipe.yaml --dry-run
    """
    from edgetune.recipe_file import load

    loaded = load(recipe, overrides or [])
    if dry_run:
        from edgetune.cli.plan import show

        crew = who_trains(loaded, nproc, hostfile)
        show(loaded, check_stage(first), check_stage(until), force, json, crew, with_recipe=True)
        return
    from edgetune.run import STAGES
    from edgetune.summary import as_json, summary

    result = run_with(
        loaded, nproc, hostfile, first=check_stage(first), until=check_stage(until) or STAGES[-1], force=force
    )
    if result is None:
        return
    if json:
        print_json(as_json(result))
    else:
        print_table(("result", "value"), summary(result))
    if result.missed:
        raise result.missed


def run_with(loaded: LoadedRecipe, nproc: int | None, hostfile: Path | None, **how: Any) -> Result | None:
    """Run a recipe, its training with as many processes as the person, the recipe or a scheduler says.

    Args:
        loaded: the recipe.
        nproc, hostfile: as the person said.
        how: of `Pipeline.run`.

    Returns:
        What was done; None where this process only took part in the training that another one leads.
    """
    from edgetune.pipeline import Pipeline

    found = who_trains(loaded, nproc, hostfile)
    if found is None:
        return Pipeline(loaded).run(**how)
    from edgetune.train import launch

    if not found.leads:
        launch.follow(found, loaded.recipe.train.threads)
        return None
    with launch.leading(found):
        return Pipeline(loaded, crew=found).run(**how)


def who_trains(loaded: LoadedRecipe, nproc: int | None, hostfile: Path | None) -> Crew | None:
    """The processes that are to train, as the person, the recipe or a scheduler says; None for this one alone.

    Raises:
        InputError: there cannot be so many, or the recipe cannot be trained so.
    """
    from edgetune.errors import require_extra
    from edgetune.train import crew, distributed

    found = crew.find(loaded.recipe.train, nproc, hostfile)
    if found:
        require_extra("train")
        distributed.check(loaded.recipe.train, found.size)
    return found


def check_stage(name: str | None) -> str | None:
    """A stage's name, or None. Raises InputError for another word."""
    from edgetune.run import STAGES

    if name is None or name in STAGES:
        return name
    import difflib

    from edgetune.errors import InputError

    near = difflib.get_close_matches(name, STAGES, 1)
    raise InputError(
        f"there is no stage `{name}`",
        fix=(f"did you mean `{near[0]}`? " if near else "") + f"stages: {', '.join(STAGES)}",
    )
