"""`edgetune bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from edgetune.cli._common import Json, print_json, print_table

_UNSET = "; the recipe's default when not given."


def command(
    artifact: Annotated[Path, typer.Argument(help="An artifact or a run folder.", show_default=False)],
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help=f"Length of each prompt{_UNSET}")] = None,
    new_tokens: Annotated[int | None, typer.Option(min=2, help=f"Tokens generated after each prompt{_UNSET}")] = None,
    warmup: Annotated[int | None, typer.Option(min=0, help=f"Rounds that are not counted{_UNSET}")] = None,
    repetitions: Annotated[int | None, typer.Option(min=1, help=f"Rounds that are counted{_UNSET}")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores when not given.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for report.json, report.csv (every sample) and report.md."),
    ] = None,
    format: Annotated[  # the option's name is the parameter's
        Literal["table", "json", "csv", "markdown"], typer.Option(help="What is printed on stdout.")
    ] = "table",
    json: Json = False,
) -> None:
    """Measure how fast an artifact answers on this machine, and the memory it takes.

    Time to first token, prefill and decode rates, inter-token latency, load time and peak memory, over rounds
    with distinct prompts, in a process of its own.

    \b
    Examples:
      edgetune bench runs/quickstart/artifact
      edgetune bench runs/quickstart --threads 1 --repetitions 10 --out bench-1-thread
      edgetune bench runs/quickstart/artifact --prompt-tokens 1024 --format csv > samples.csv
    """
    from edgetune.recipe import BenchSection
    from edgetune.runtime.bench import as_csv, as_markdown, bench, table

    options = {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "warmup": warmup,
        "repetitions": repetitions,
        "threads": threads,
    }
    section = BenchSection.model_validate({name: value for name, value in options.items() if value is not None})
    report = bench(artifact, section, out)
    if json or format == "json":
        print_json(report)
    elif format == "csv":
        typer.echo(as_csv(report), nl=False)
    elif format == "markdown":
        typer.echo(as_markdown(report), nl=False)
    else:
        print_table(("measured", "value"), table(report))
