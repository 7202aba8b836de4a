"""`edgetune recipes`: the recipes that come with edgetune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgetune.cli._common import Json, print_json, print_table

app = typer.Typer(
    help="List, show and copy the shipped recipes; print the recipe's JSON Schema.",
    epilog="Example: edgetune recipes ls",
    rich_markup_mode=None,
    no_args_is_help=True,
)
Name = Annotated[str, typer.Argument(help="A shipped recipe's name, or a recipe file.", show_default=False)]


@app.command("ls")
def ls(json: Json = False) -> None:
    """List the shipped recipes.

    \b
    Example:
      edgetune recipes ls
    """
    from edgetune.recipe_file import load, shipped

    found = [(path.stem, load(str(path)).recipe) for path in sorted(shipped("recipes").glob("*.yaml"))]
    if json:
        print_json(
            [{"name": name, "description": recipe.description, "model": recipe.model.id} for name, recipe in found]
        )
    else:
        print_table(
            ("name", "model", "what it shows"),
            [(name, recipe.model.id, recipe.description) for name, recipe in found],
        )


@app.command("show")
def show(name: Name) -> None:
    """Print a recipe as it was written, comments included.

    \b
    Example:
      edgetune recipes show quickstart
    """
    from edgetune.recipe_file import find

    typer.echo(find(name).read_text(encoding="utf-8"), nl=False)


@app.command("cp")
def cp(
    name: Name,
    to: Annotated[Path, typer.Argument(help="Folder, or file ending in .yaml.", show_default=False)] = Path(),
) -> None:
    """Copy a recipe and the data it names, to change them.

    \b
    Examples:
      edgetune recipes cp quickstart .
      edgetune recipes cp quickstart mine.yaml
    """
    from edgetune.recipe_file import copy

    for path in copy(name, to):
        typer.echo(str(path))


@app.command("schema")
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors.

    \b
    Example:
      edgetune recipes schema > recipe.schema.json
    """
    from edgetune.recipe import Recipe

    print_json(Recipe.model_json_schema())
