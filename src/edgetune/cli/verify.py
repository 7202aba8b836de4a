"""`edgetune verify`: the gate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edgetune.cli._common import Json, print_json, print_table
from edgetune.cli._generation import ADAPTER

_SHOWN = 44  # characters of the text before a worst place


def command(
    artifact: Annotated[
        Path,
        typer.Argument(
            help="Artifact, or the run that holds it; any folder with genai_config.json; a transformers folder; a GGUF file.",
            show_default=False,
        ),
    ],
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="MODEL",
            help="The merged model; any of the same kinds. `merged` beside the artifact when not given.",
        ),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=ADAPTER),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Held-out examples; the run's validation rows when not given."),
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="How many rows are compared.")] = None,
    step: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS",
            min=1,
            help="Feed rows to the artifact this many tokens at a time: 1 as in decoding, 64 as the runtime reads prompts; "
            "whole rows when not given.",
        ),
    ] = None,
    provider: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Where the artifact runs: cpu, openvino, qnn, …; what it was made for when not given.",
        ),
    ] = None,
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

    Either side may come from another tool, as long as both have the same vocabulary. Everything is in nats over the tokens
    that carry loss; the table of the worst places ends with the token that really follows.

    \b
    Examples:
      edgetune verify runs/quickstart/artifact
      edgetune verify ./artifact --against ./merged --data rows.jsonl --rows 100
      edgetune verify ./olive-output --against ./model.gguf --data rows.jsonl
      edgetune verify skills --adapter sql --against runs/sql/merged --data runs/sql/data/validation.jsonl
      edgetune verify runs/quickstart --step 1 --limit top1_agreement=0.95 --json
      edgetune verify runs/npu --provider cpu
    """
    from edgetune.export.verify import gate_error
    from edgetune.recipe_file import limits_from
    from edgetune.standalone_verify import verify_artifact

    found = verify_artifact(
        artifact, against, data, rows, limits_from(limit or []), out, step=step, provider=provider, adapter=adapter
    )
    if json:
        print_json(found)
    else:
        print_table(("measure", "value", "limit"), _measures(found))
        columns = ("tokens", "KL mean", "KL max", "best token agrees", "perplexity ratio")
        print_table(("position in the row", *columns), _parts(found["by_position"]))
        print_table(("next token", *columns), _parts(found["by_token_class"]))
        print_table(
            ("KL", "where, token", "…text, then", "wanted", "found"),
            [_place(place) for place in found["worst"]],
            title="where they are furthest apart",
        )
    if not found["passed"]:
        raise gate_error(found, Path(found["path"]))


def _measures(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    limits, perplexity, step = found["limits"], found["perplexity"], found["step"]
    shares = [f"{name.replace('_', '.')} {found[f'kld_{name}']:.4f}" for name in ("median", "p90", "p95", "p99_9")]
    error = "" if perplexity["ratio_se"] is None else f" ± {perplexity['ratio_se']:.4f}"
    return [
        *((("adapter", found["adapter"], ""),) if "adapter" in found else ()),
        ("KL divergence, mean", f"{found['kld_mean']:.4f} nats", f"at most {limits['kld_mean']:g}"),
        ("KL divergence, p99", f"{found['kld_p99']:.4f} nats", f"at most {limits['kld_p99']:g}"),
        ("KL divergence, others", ", ".join([*shares, f"largest {found['kld_max']:.4f}"]), ""),
        ("Δp of the next token, RMS", f"{found['delta_p_rms']:.2%}", ""),
        (
            "best token agrees",
            f"{found['top1_agreement']:.2%} of {found['tokens']:,} tokens",
            f"at least {limits['top1_agreement']:.0%}",
        ),
        (
            "perplexity",
            f"{perplexity['merged']:.3f} merged → {perplexity['artifact']:.3f} artifact, ratio {perplexity['ratio']:.4f}{error}",
            f"at most {limits['perplexity_ratio']:g}",
        ),
        ("rows were fed", "whole" if step is None else f"{step} token{'s' * (step != 1)} at a time", ""),
        *(_device(found["device"])),
        *((f"greedy answer to “{text['prompt'][:30]}”", _parting(text), "") for text in found["golden"]),
        *(("warning", text, "") for text in found["warnings"]),
        ("gate", "passed" if found["passed"] else "NOT PASSED", ""),
    ]


def _device(device: dict[str, Any] | None) -> list[tuple[str, str, str]]:
    if device is None or (device["ran"] and device["provider"] == "cpu"):
        return []
    shares = ", ".join(f"{name} {share:.1%}" for name, share in device["shares"].items())
    what = "" if device["ran"] else " (not what the artifact was made for)"
    return [("run on", f"{device['provider']}{what}", ""), ("nodes by provider", shares, "")]


def _parts(groups: dict[str, dict[str, float]]) -> list[tuple[str, ...]]:
    return [
        (
            name,
            f"{part['tokens']:,}",
            f"{part['kld_mean']:.4f}",
            f"{part['kld_max']:.4f}",
            f"{part['top1_agreement']:.1%}",
            f"{part['perplexity_ratio']:.4f}",
        )
        for name, part in groups.items()
    ]


def _place(place: dict[str, Any]) -> tuple[str, ...]:
    from edgetune.train.samples import ending

    context = ending(place["context"], _SHOWN)
    wanted, found = (
        ", ".join(f"{token['text']!r} {token['probability']:.0%}" for token in place[side][:2])
        for side in ("merged", "artifact")
    )
    where = f"{place['where']}, {place['position'] + 1}"
    return f"{place['kld']:.3f}", where, f"{context} · {place['next']['text']!r}", wanted, found


def _parting(text: dict[str, object]) -> str:
    where = text["divergent_at"]
    return f"the same, {text['tokens']} tokens" if where is None else f"parts at token {where}"
