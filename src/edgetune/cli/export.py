"""`edgetune export`: an ONNX artifact of a merged model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgetune.cli._common import Json, print_json, print_table


def command(
    model: Annotated[Path, typer.Argument(help="Transformers folder, such as runs/NAME/merged.", show_default=False)],
    target: Annotated[
        str | None,
        typer.Option(metavar="TARGET", help="cpu-int8 (the default), cpu-fp32, cpu-int4, or a target file."),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(metavar="TOKENS", help="Context of the artifact, prompt and answer together."),
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
    """Make an ONNX artifact of a transformers folder, and load it once.

    \b
    Examples:
      edgetune export runs/quickstart/merged --target cpu-fp32 --out fp32
      edgetune export ./my-model --target cpu-int4 --data rows.jsonl --max-length 1024 --out ./artifact
    """
    from edgetune.errors import InputError
    from edgetune.recipe import ExportSection
    from edgetune.standalone import export_model

    given = {name: value for name, value in (("target", target), ("max_length", max_length)) if value is not None}
    try:
        section = ExportSection.model_validate(given)
    except ValueError as error:
        raise InputError("must be 16 tokens or more", where="--max-length") from error
    found = export_model(model, out or Path("artifact"), section, name, data)
    if json:
        print_json(found)
        return
    rows = [
        ("artifact", found["path"]),
        ("precision", f"{found['precision']} on {found['provider']}"),
        ("size on disk", f"{found['size_mb']:,.1f} MB"),
        ("context", f"{found['max_length']:,} tokens (the model's own limit: {found['model_context']:,})"),
        ("took", f"{found['seconds']:.0f} s, peak {found['builder_peak_rss_mb']:,.0f} MB"),
        ("next", f"edgetune verify {found['path']} --against {model} --data FILE"),
    ]
    print_table(("result", "value"), rows)
