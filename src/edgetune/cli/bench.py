"""`edgetune bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from edgetune.cli._common import Json, NoProfile, print_json, print_table
from edgetune.cli._generation import ADAPTER

_UNSET = "; the recipe's default when not given."
_WORK, _WAYS, _COMPARE, _HTTP, _OUTPUT = "What is measured", "How", "Comparing", "A service", "What comes out"


def command(
    artifact: Annotated[
        Path | None, typer.Argument(help="An artifact or a run folder; none with --url.", show_default=False)
    ] = None,
    workload: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="ppN, tgN, ppN+tgM, chat, copy, standard; with commas between.",
            rich_help_panel=_WORK,
        ),
    ] = None,
    depth: Annotated[
        str | None,
        typer.Option(metavar="N,…", help="Tokens in the context already, for ppN and tgN.", rich_help_panel=_WORK),
    ] = None,
    batch: Annotated[
        str | None, typer.Option(metavar="N,…", help="Rows at once, for ppN and tgN.", rich_help_panel=_WORK)
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Your own: .jsonl with messages or prompt, or a text.",
            rich_help_panel=_WORK,
        ),
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help=f"Length of each prompt{_UNSET}", rich_help_panel=_WORK)
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(min=2, help=f"Tokens generated after each prompt{_UNSET}", rich_help_panel=_WORK)
    ] = None,
    warmup: Annotated[
        int | None, typer.Option(min=0, help=f"Rounds that are not counted{_UNSET}", rich_help_panel=_WAYS)
    ] = None,
    repetitions: Annotated[
        int | None, typer.Option(min=1, help=f"Rounds that are counted{_UNSET}", rich_help_panel=_WAYS)
    ] = None,
    threads: Annotated[
        str | None,
        typer.Option(
            metavar="N,…", help="CPU threads, all cores when not given; several are swept.", rich_help_panel=_WAYS
        ),
    ] = None,
    adapter: Annotated[str | None, typer.Option(metavar="NAME", help=ADAPTER, rich_help_panel=_WAYS)] = None,
    provider: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Execution provider, in place of the artifact's own.", rich_help_panel=_WAYS),
    ] = None,
    no_profile: NoProfile = False,
    stress: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="Busy processes beside every second round.", rich_help_panel=_WAYS),
    ] = None,
    loads: Annotated[
        int | None,
        typer.Option(min=0, help="How often loading is timed, from disk and from memory.", rich_help_panel=_WAYS),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            metavar="OTHER",
            help="Another artifact, measured in turn, or a saved report.json.",
            rich_help_panel=_COMPARE,
        ),
    ] = None,
    fail_below: Annotated[
        float | None,
        typer.Option(
            metavar="RATIO", min=0, help="Exit 3 when it is slower than so many times OTHER.", rich_help_panel=_COMPARE
        ),
    ] = None,
    expect_tokens: Annotated[
        str | None,
        typer.Option(
            metavar="SHA256", help="Exit 3 when the produced tokens have another hash.", rich_help_panel=_COMPARE
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="An OpenAI-compatible service, in place of an artifact.", rich_help_panel=_HTTP),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="With --url: the model to ask for.", rich_help_panel=_HTTP)
    ] = None,
    concurrency: Annotated[
        str | None,
        typer.Option(metavar="N,…", help="With --url: clients at once.", rich_help_panel=_HTTP),
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="With --url: seconds of silence that are borne.", rich_help_panel=_HTTP)
    ] = 300.0,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder for report.json, .csv (every sample), .md and .html (plots).",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    format: Annotated[  # the option's name is the parameter's
        Literal["table", "json", "csv", "markdown", "html"],
        typer.Option(help="What is printed on stdout.", rich_help_panel=_OUTPUT),
    ] = "table",
    json: Json = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON Schema of reports.", rich_help_panel=_OUTPUT)
    ] = False,
) -> None:
    """Measure how fast an artifact answers on this machine, and what it takes.

    Time to first token, prefill and decode rates, latencies with percentiles and intervals, tokenization and sampling
    apart, load time, memory, the share of the memory's bandwidth: over rounds with distinct prompts, in processes that
    do nothing else.

    \b
    Examples:
      edgetune bench runs/quickstart/artifact
      edgetune bench runs/quickstart --workload standard --out report
      edgetune bench runs/quickstart --threads 1,2,4
      edgetune bench runs/int4 --compare runs/int8 --fail-below 0.95
      edgetune bench --url http://127.0.0.1:8080 --concurrency 1,2,4
    """
    from edgetune.errors import InputError
    from edgetune.runtime.bench.measure import expect
    from edgetune.runtime.bench.report import schema as report_schema

    if schema:
        print_json(report_schema())
        return
    if (artifact is None) == (url is None):
        what = "there is nothing to measure" if url is None else "an artifact and --url are both given"
        raise InputError(what, fix="give an artifact, or --url ADDRESS")
    if fail_below is not None and compare is None:
        raise InputError("needs something to compare with", where="--fail-below", fix="add --compare OTHER")
    if expect_tokens is not None and not _is_hash(expect_tokens):
        raise InputError(
            "must be 8 to 64 hexadecimal digits", where="--expect-tokens", fix="take tokens_sha256 of a report"
        )
    lengths = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "warmup": warmup, "repetitions": repetitions}
    ways = {
        "workloads": None if workload is None else tuple(name.strip() for name in workload.split(",") if name.strip()),
        "depths": _numbers("--depth", depth, 0),
        "batch_sizes": _numbers("--batch", batch, 1),
        "prompts": None if prompts is None else str(prompts),
        "threads": _numbers("--threads", threads, 1),
        "provider": provider,
        "adapter": adapter,
        "stress": stress,
        "loads": loads,
        "use_profile": False if no_profile else None,
    }
    if artifact is None:
        allowed = {"prompts": prompts}
        _only("--url", {"compare": compare, **{name: value for name, value in ways.items() if name not in allowed}})
        report = _of_service(str(url), (model, _numbers("--concurrency", concurrency, 1), timeout), lengths, ways, out)
    else:
        _only("an artifact", {"model": model, "concurrency": concurrency})
        report = _of_artifact(artifact, compare, lengths, ways, out)
    _print(report, "json" if json else format)
    if expect_tokens is not None:
        expect(report, expect_tokens)
    if fail_below is not None:
        from edgetune.runtime.bench.compare import check

        check(report["comparison"], fail_below)


def _of_service(
    url: str, asked: tuple[Any, ...], lengths: dict[str, Any], ways: dict[str, Any], out: Path | None
) -> dict[str, Any]:
    from edgetune.recipe import BenchOptions, BenchSection
    from edgetune.runtime.bench.http import bench_url

    model, clients, timeout = asked
    section, options = BenchSection(**_given(lengths)), BenchOptions(**_given(ways))
    return bench_url(url, model, clients or (1,), section, out, options, timeout)


def _of_artifact(
    artifact: Path, other: Path | None, lengths: dict[str, Any], ways: dict[str, Any], out: Path | None
) -> dict[str, Any]:
    from edgetune.recipe import BenchOptions, BenchSection
    from edgetune.runtime.bench.compare import compare
    from edgetune.runtime.bench.measure import bench

    section, options = BenchSection(**_given(lengths)), BenchOptions(**_given(ways))
    return bench(artifact, section, out, options) if other is None else compare(artifact, other, section, out, options)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _only(what: str, options: dict[str, Any]) -> None:
    from edgetune.errors import InputError

    names = {"workloads": "workload", "depths": "depth", "batch_sizes": "batch"}
    for name, value in options.items():
        if value is not None:
            raise InputError(f"does not go with {what}", where=f"--{names.get(name, name)}", fix="leave it out")


def _numbers(option: str, text: str | None, least: int) -> tuple[int, ...] | None:
    """`1,2,4` as numbers. Raises InputError."""
    from edgetune.errors import InputError

    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and least <= int(part) < 10**7 for part in parts):
        raise InputError(
            f"takes whole numbers from {least} with commas between, not {text!r}", where=option, fix="such as 1,2,4"
        )
    return tuple(dict.fromkeys(int(part) for part in parts))


def _is_hash(text: str) -> bool:
    return 8 <= len(text) <= 64 and all(digit in "0123456789abcdefABCDEF" for digit in text)


def _print(report: dict[str, Any], format: str) -> None:
    from edgetune.runtime.bench.page import as_html
    from edgetune.runtime.bench.text import as_csv, as_markdown, table

    if format == "json":
        print_json(report)
    elif format == "table":
        print_table(("measured", "value"), table(report))
    else:
        make = {"csv": as_csv, "markdown": as_markdown, "html": as_html}[format]
        typer.echo(make(report), nl=False)
