"""`edgetune merge`: fold an adapter into its base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgetune.cli._common import Json, print_json, print_table


def command(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder in peft's format.", show_default=False)],
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The base model; what the adapter's configuration names when not given."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The merged model; ./merged when not given."),
    ] = None,
    json: Json = False,
) -> None:
    """Fold an adapter into its base in float32, and prove that nothing else changed.

    \b
    Examples:
      edgetune merge runs/quickstart/adapter --out my-model
      edgetune merge ./adapter --base ./base-model --out ./merged
    """
    from edgetune.recipe import ModelSection
    from edgetune.standalone import merge_adapter

    target = out or Path("merged")
    found = merge_adapter(adapter, target, ModelSection(id=base) if base else None)
    if json:
        print_json(found)
        return
    rows = [
        ("merged model", found["path"]),
        (
            "difference to base + adapter",
            f"{found['max_logprob_difference']:.1e} in log-probability, at most {found['tolerance']:.0e}",
        ),
        ("largest change of a weight", f"{found['largest_update']:.2e}"),
        ("size on disk", f"{found['size_mb']:,.1f} MB"),
        *(("warning", warning) for warning in found["warnings"]),
        ("next", f"edgetune export {found['path']}"),
    ]
    print_table(("result", "value"), rows)
