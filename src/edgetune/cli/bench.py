"""`edgetune bench`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from edgetune.cli._common import Json, NoProfile, kept_if_ended, option, print_json, print_table, section_of
from edgetune.cli._generation import ADAPTER

if TYPE_CHECKING:
    from edgetune.recipe import BenchOptions, BenchSection

_NAMES = {"depths": "depth", "batch_sizes": "batch", "use_profile": "no-profile", "workloads": "workload"}
_ROUNDS = 10_000
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
            help="ppN, tgN, ppN+tgM, chat, copy, standard; with commas between. With --url, N words for ppN.",
            rich_help_panel=_WORK,
        ),
    ] = None,
    depth: Annotated[
        str | None,
        typer.Option(
            metavar="N,…",
            help="Tokens in the context already, for ppN and tgN (with --url: for tgN).",
            rich_help_panel=_WORK,
        ),
    ] = None,
    batch: Annotated[
        str | None, typer.Option(metavar="N,…", help="Rows at once, for ppN and tgN.", rich_help_panel=_WORK)
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Your own: .jsonl with messages or prompt, or a text; each is asked once in a round.",
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
        int | None, typer.Option(min=0, max=_ROUNDS, help=f"Rounds that are not counted{_UNSET}", rich_help_panel=_WAYS)
    ] = None,
    repetitions: Annotated[
        int | None, typer.Option(min=1, max=_ROUNDS, help=f"Rounds that are counted{_UNSET}", rich_help_panel=_WAYS)
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
    speculation: Annotated[
        str | None,
        typer.Option(
            metavar="auto|on|off",
            help="Guess tokens ahead in chat, copy and prompts; auto: where `edgetune tune` measured it.",
            rich_help_panel=_WAYS,
        ),
    ] = None,
    exact: Annotated[
        bool,
        typer.Option("--exact", help="Chat, copy and prompts without guessing ahead.", rich_help_panel=_WAYS),
    ] = False,
    stress: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=0, max=1024, help="Busy processes beside every second round.", rich_help_panel=_WAYS
        ),
    ] = None,
    loads: Annotated[
        int | None,
        typer.Option(
            min=0, max=_ROUNDS, help="How often loading is timed, from disk and from memory.", rich_help_panel=_WAYS
        ),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="OTHER",
            help="Another artifact (with --url: another address), measured in turn, or a saved report.json.",
            rich_help_panel=_COMPARE,
        ),
    ] = None,
    compare_model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="With two addresses: the model of the other.", rich_help_panel=_COMPARE),
    ] = None,
    fail_below: Annotated[
        float | None,
        typer.Option(
            metavar="RATIO",
            min=0,
            help="Exit 3 when it is slower than so many times OTHER, the same files give other tokens, or work is missing.",
            rich_help_panel=_COMPARE,
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
        float | None,
        typer.Option(help="With --url: seconds of silence that are borne, 300 when not given.", rich_help_panel=_HTTP),
    ] = None,
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
      edgetune bench --url http://127.0.0.1:8080 --compare http://127.0.0.1:11434 --workload chat,copy
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
        "workloads": _workloads(workload),
        "depths": _numbers("--depth", depth, 0),
        "batch_sizes": _numbers("--batch", batch, 1, 1024),
        "prompts": None if prompts is None else str(prompts),
        "threads": _numbers("--threads", threads, 1),
        "provider": provider,
        "adapter": adapter,
        "stress": stress,
        "loads": loads,
        "use_profile": False if no_profile else None,
        "speculation": _speculation(speculation),
        "exact": exact or None,
    }
    given = _Given(lengths, ways, out)
    nothing = kept_if_ended("nothing is kept: the report is made when all is measured")
    if artifact is None:
        allowed = {"prompts", "workloads", "depths"}
        _only("--url", {name: value for name, value in ways.items() if name not in allowed})
        _only("a saved report", {"compare_model": compare_model if "://" not in (compare or "://") else None})
        clients = _numbers("--concurrency", concurrency, 1) or (1,)
        silence = 300.0 if timeout is None else timeout
        with nothing:
            report = _of_service(str(url), model, compare, compare_model, clients, silence, given)
    else:
        others = {"model": model, "concurrency": concurrency, "compare_model": compare_model, "timeout": timeout}
        _only("an artifact", others)
        with nothing:
            report = _of_artifact(artifact, compare, given)
    _print(report, "json" if json else format)
    if expect_tokens is not None:
        expect(report, expect_tokens)
    if fail_below is not None:
        from edgetune.runtime.bench.verdict import check

        check(report["comparison"], fail_below)


@dataclass(frozen=True)
class _Given:
    """Options by the names that the recipe has them under, None where not given, and the folder for the report."""

    lengths: dict[str, Any]
    ways: dict[str, Any]
    out: Path | None

    def how(self) -> tuple[BenchSection, Path | None, BenchOptions]:
        """Section, folder and options, as the benchmark takes them. Raises InputError."""
        from edgetune.recipe import BenchOptions, BenchSection

        return (
            section_of(BenchSection, self.lengths, _NAMES),
            self.out,
            section_of(BenchOptions, self.ways, _NAMES),
        )


def _of_service(
    url: str,
    model: str | None,
    other: str | None,
    other_model: str | None,
    clients: tuple[int, ...],
    timeout: float,
    given: _Given,
) -> dict[str, Any]:
    from edgetune.runtime.bench.compare import compare_url
    from edgetune.runtime.bench.http import bench_url

    if other is None:
        return bench_url(url, model, clients, *given.how(), timeout)
    return compare_url(url, model, other, other_model, clients, *given.how(), timeout)


def _of_artifact(artifact: Path, other: str | None, given: _Given) -> dict[str, Any]:
    from edgetune.errors import InputError
    from edgetune.runtime.bench.compare import compare
    from edgetune.standalone_bench import bench_artifact

    section, out, options = given.how()
    if other is None:
        return bench_artifact(artifact, section, out, options)
    if "://" in other:
        raise InputError(
            "is a service, and an artifact is measured without one",
            where="--compare",
            fix="`edgetune serve` the artifact, and give its address with --url",
        )
    return compare(artifact, Path(other), section, out, options)


def _speculation(given: str | None) -> str | None:
    from edgetune.errors import InputError

    if given not in (None, "auto", "on", "off"):
        raise InputError(f"must be auto, on or off, not {given!r}", where="--speculation", fix="such as on")
    return given


def _only(what: str, options: dict[str, Any]) -> None:
    from edgetune.errors import InputError

    for name, value in options.items():
        if value is not None:
            raise InputError(f"does not go with {what}", where=option(name, _NAMES), fix="leave it out")


def _workloads(text: str | None) -> tuple[str, ...] | None:
    from edgetune.errors import InputError

    if text is None:
        return None
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise InputError("names nothing", where="--workload", fix="such as pp512,tg128; leave it out for one prompt")
    return names


def _numbers(option: str, text: str | None, least: int, most: int = 10**7 - 1) -> tuple[int, ...] | None:
    """`1,2,4` as numbers. Raises InputError."""
    from edgetune.errors import InputError

    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 9 and least <= int(part) <= most for part in parts):
        raise InputError(
            f"takes whole numbers from {least} to {most:,} with commas between, not {text!r}",
            where=option,
            fix="such as 1,2,4",
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
