"""`edgetune verify`: the gate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgetune.cli._common import Json, print_json, print_table


def command(
    artifact: Annotated[Path, typer.Argument(help="Artifact, or the run that holds it.", show_default=False)],
    against: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The merged model; `merged` beside the artifact when not given."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Held-out examples; the run's validation rows when not given."),
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="How many rows are compared.")] = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="A limit in place of the run's, such as kld_mean=0.1. Repeatable."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder for report.json; nothing is written when not given."),
    ] = None,
    json: Json = False,
) -> None:
    """Compare an artifact with the merged model on held-out rows. Exit 3 when a limit is missed.

    \b
    Examples:
      edgetune verify runs/quickstart/artifact
      edgetune verify ./artifact --against ./merged --data rows.jsonl --rows 100
      edgetune verify runs/quickstart --limit top1_agreement=0.95 --json
    """
    from edgetune.export.verify import gate_error
    from edgetune.recipe_file import limits_from
    from edgetune.standalone import verify_artifact

    found = verify_artifact(artifact, against, data, rows, limits_from(limit or []), out)
    if json:
        print_json(found)
    else:
        limits = found["limits"]
        print_table(
            ("measure", "value", "limit"),
            [
                ("KL divergence, mean", f"{found['kld_mean']:.4f} nats", f"at most {limits['kld_mean']:g}"),
                ("KL divergence, p99", f"{found['kld_p99']:.4f} nats", f"at most {limits['kld_p99']:g}"),
                ("KL divergence, largest", f"{found['kld_max']:.4f} nats", ""),
                (
                    "best token agrees",
                    f"{found['top1_agreement']:.2%} of {found['tokens']:,} tokens",
                    f"at least {limits['top1_agreement']:.0%}",
                ),
                ("perplexity, merged model", f"{found['perplexity']['merged']:.3f}", ""),
                (
                    "perplexity, artifact",
                    f"{found['perplexity']['artifact']:.3f}",
                    f"at most {limits['perplexity_ratio']:g} times that",
                ),
                *((f"greedy answer to “{text['prompt'][:30]}”", _parting(text), "") for text in found["golden"]),
                *(("warning", text, "") for text in found["warnings"]),
                ("gate", "passed" if found["passed"] else "NOT PASSED", ""),
            ],
        )
    if not found["passed"]:
        raise gate_error(found, Path(found["path"]))


def _parting(text: dict[str, object]) -> str:
    where = text["divergent_at"]
    return f"the same, {text['tokens']} tokens" if where is None else f"parts at token {where}"
