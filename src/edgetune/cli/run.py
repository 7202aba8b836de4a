"""`edgetune run`: a recipe becomes an edge artifact."""

from __future__ import annotations

from typing import Annotated

import typer

from edgetune.cli._common import Json, print_json, print_table

Recipe = Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped recipe.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace the recipe's.", show_default=False),
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

        show(loaded, check_stage(first), check_stage(until), force, json, with_recipe=True)
        return
    from edgetune.pipeline import Pipeline
    from edgetune.run import STAGES
    from edgetune.summary import as_json, summary

    pipeline = Pipeline(loaded)
    result = pipeline.run(first=check_stage(first), until=check_stage(until) or STAGES[-1], force=force)
    if json:
        print_json(as_json(result))
    else:
        print_table(("result", "value"), summary(result))
    if result.missed:
        raise result.missed


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
