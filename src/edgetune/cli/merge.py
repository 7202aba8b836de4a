"""`edgetune merge`: fold an adapter into its base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from edgetune.cli._common import Json, print_json, print_table


def command(
    adapter: Annotated[
        Path,
        typer.Argument(
            help="Adapter folder in peft's format, or what a training with method full wrote.", show_default=False
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The base model; what the adapter's configuration names when not given."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The merged model; ./merged when not given."),
    ] = None,
    onto: Annotated[
        Literal["trained", "full-precision"],
        typer.Option(
            help="qlora adapters: the 4-bit weights that were trained against, or the base as it was published."
        ),
    ] = "trained",
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="qlora adapters: examples on which the loss with both is measured; the run's own rows when not given.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Fold an adapter into its base in float32, and prove that nothing else changed.

    An adapter that was trained with qlora is folded into the 4-bit weights that it was trained against, dequantized;
    --onto full-precision takes the published base, and tells the loss of both.

    \b
    Examples:
      edgetune merge runs/quickstart/adapter --out my-model
      edgetune merge ./adapter --base ./base-model --out ./merged
      edgetune merge runs/qlora/adapter --onto full-precision --out ./merged
    """
    from edgetune.recipe import ModelSection
    from edgetune.standalone import merge_adapter

    target = out or Path("merged")
    found = merge_adapter(adapter, target, ModelSection(id=base) if base else None, onto=onto, data=data)
    if json:
        print_json(found)
        return
    rows = [
        ("merged model", found["path"]),
        (
            "difference to base + adapter",
            f"{found['max_logprob_difference']:.1e} in log-probability, at most {found['tolerance']:.0e}",
        ),
        *_told(found),
        ("size on disk", f"{found['size_mb']:,.1f} MB"),
        *(("warning", warning) for warning in found["warnings"]),
        ("next", f"edgetune export {found['path']}"),
    ]
    print_table(("result", "value"), rows)


def _told(found: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if found["largest_update"] is not None:
        rows.append(("largest change of a weight", f"{found['largest_update']:.2e}"))
    for which, loss in (found.get("validation_loss") or {}).items():
        chosen = " (merged)" if which == found["onto"] else ""
        rows.append((f"validation loss, {which} weights", f"{loss:.4f}{chosen}"))
    return rows
