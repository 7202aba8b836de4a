"""Reports as a table for people, as CSV and as markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any


def table(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The report for people: rows of what and value."""
    entries = report["workloads"]
    return [
        *_head(report),
        *(_one(entries[0]) if len(entries) == 1 else _several(entries)),
        *_guessing(report),
        *_device(report),
        ("tokens", f"{report['tokens']:,}, SHA-256 {report['tokens_sha256'][:16]}…"),
        *_scaling(report),
        *_stress(report),
        *_comparison(report),
        *(("warning", text) for text in report["warnings"]),
    ]


METRIC_HEAD = ("workload", "metric", "p50", "p95", "p99", "mean", "95 % of the mean", "std", "min", "max", "samples")


def metrics(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Everything that is known of each metric of each workload: rows under `METRIC_HEAD`."""
    found = []
    for entry in report["workloads"]:
        for name, of in ((entry["name"], entry), (f"{entry['name']}, nothing beside", entry.get("quiet") or {})):
            for key, what in _NAMES.items():
                if one := of.get(key):
                    first = [_short(one[part]) for part in ("p50", "p95", "p99", "mean")]
                    rest = ["" if one["std"] is None else _short(one["std"]), _short(one["min"]), _short(one["max"])]
                    found.append((name, what, *first, _span(one), *rest, f"{one['n']:,}"))
    return found


_NAMES = {
    "ttft_ms": "time to first token, ms",
    "tpot_ms": "time per output token, ms",
    "itl_ms": "inter-token latency, ms",
    "e2e_ms": "end to end, ms",
    "prefill_tokens_per_s": "prefill, tokens/s",
    "decode_tokens_per_s": "decode, tokens/s",
    "tokenization_ms": "tokenization, ms",
    "prefill_ms": "reading the prompt, ms",
    "sampling_ms": "sampling a token, ms",
    "decode_ms": "decoding a token, ms",
    "detokenization_ms": "making text, ms",
}


def _head(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    cpu = report["hardware"]["cpu"]
    if report["target"]["kind"] == "http":
        yield "service", f"{report['target']['url']}, model {report['artifact']}"
        yield "measured from", f"{cpu['model']}, {cpu['usable_cores']} cores"
    else:
        threads = f"{report['threads']} thread{'s' * (report['threads'] != 1)}"
        provider = report["target"]["provider"]
        where = "" if provider == "cpu" else f", {provider}"
        adapter = report["target"].get("adapter")
        on = f", adapter {adapter}" if adapter else ""
        yield "artifact", f"{report['artifact']}{on}, {report['size_mb']:,.1f} MB"
        yield "measured on", f"{cpu['model']}, {cpu['usable_cores']} cores, {threads}{where}"
    lengths = ""
    if len(report["workloads"]) == 1:
        one = report["workloads"][0]
        lengths = f", {one['prompt_tokens']} prompt tokens, {one['new_tokens']} new tokens"
    yield "rounds", f"{report['workloads'][0]['rounds']} after {report['warmup']} to warm up{lengths}"


def _one(entry: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if entry["kind"] != "drawn" or entry["depth"] or entry["batch"] > 1 or not entry["itl_ms"] or not entry["ttft_ms"]:
        yield "workload", entry["name"]
    if entry["ttft_ms"]:
        yield "time to first token", _percentiles(entry["ttft_ms"], 1)
    for name in ("prefill", "decode"):
        if entry[f"{name}_tokens_per_s"]:
            yield name, _rate(entry[f"{name}_tokens_per_s"])
    for name, what, digits in (
        ("tpot_ms", "time per output token", 2),
        ("itl_ms", "inter-token latency", 2),
        ("e2e_ms", "end to end", 1),
    ):
        if entry[name]:
            yield what, _percentiles(entry[name], digits)
    if parts := _apart(entry):
        yield "apart", parts
    if entry["cached"]:
        yield "known already", f"{entry['cached']:.0%} of the prompts' tokens, of earlier ones"
    if entry["quoted"] is not None:
        yield "quoted", f"{entry['quoted']:.0%} of the answers stand in their prompts"
    if entry.get("drafted_tokens"):
        yield "guessed ahead", f"{entry['accepted_tokens']:,} of {entry['drafted_tokens']:,} tokens right"


def _several(entries: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Two to three rows each: speeds, latencies, the parts of a request."""
    for entry in entries:
        parts = []
        if entry["concurrency"]:  # reading is told by the time to the first token, as it holds waiting for others, too
            failed = f", {entry['errors']} failed" if entry["errors"] else ""
            parts.append(f"in all {entry['total_tokens_per_s']:,.1f} tokens/s of {entry['requests']} requests{failed}")
        for name in ("decode",) if entry["concurrency"] else ("prefill", "decode"):
            if entry[f"{name}_tokens_per_s"]:
                parts.append(f"{name} {_rate(entry[f'{name}_tokens_per_s'])}")
        if entry["cached"]:
            parts.append(f"{entry['cached']:.0%} of the prompts known already")
        if entry["quoted"] is not None:
            parts.append(f"{entry['quoted']:.0%} quoted")
        if entry.get("drafted_tokens"):
            parts.append(f"{entry['accepted_tokens']:,} of {entry['drafted_tokens']:,} guessed tokens right")
        yield entry["name"], "; ".join(parts)
        latencies = [
            f"{what} {' / '.join(_short(entry[name][key]) for key in ('p50', 'p95', 'p99'))}"
            for name, what in (
                ("ttft_ms", "first token"),
                ("tpot_ms", "per token"),
                ("itl_ms", "between tokens"),
                ("e2e_ms", "end to end"),
            )
            if entry[name]
        ]
        if latencies:
            yield "  p50 / p95 / p99, ms", "; ".join(latencies)
        if apart := _apart(entry):
            yield "  apart", apart


def _guessing(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Why nothing was guessed, where copying was measured."""
    plain = report["target"].get("speculation") == "auto" and not report["device_profile"]
    if plain and any(entry["kind"] == "copy" for entry in report["workloads"]):
        yield "guessed ahead", "nothing, without a device profile: `edgetune tune` measures what guessing costs"


def _apart(entry: dict[str, Any]) -> str:
    names = {
        "tokenization_ms": "tokenization",
        "prefill_ms": "prefill",
        "sampling_ms": "sampling a token",
        "decode_ms": "decoding it",
        "detokenization_ms": "making text",
    }
    return ", ".join(f"{what} {_short(entry[name]['p50'])} ms" for name, what in names.items() if entry[name])


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _device(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if report["target"]["kind"] == "http":
        if report["peak_rss_mb"]:
            yield "service's memory", f"{report['peak_rss_mb']:,.1f} MB at most"
        return
    load = report["load"]
    if load:
        cold = f"{load['cold_s']['p50']:.2f} s from disk, " if load["cold_s"] else ""
        yield "load", f"{cold}{load['warm_s']['p50']:.2f} s from the page cache, the hashes checked"
        if load["note"]:
            yield "load from disk", f"not measured: {load['note']}"
    else:
        yield "load", f"{report['load_s']:.2f} s, after {report['verify_s']:.2f} s to check the hashes"
    pss = report["peak_pss_mb"]
    yield "peak memory", f"{report['peak_rss_mb']:,.1f} MB" + (f" (PSS {pss:,.1f} MB)" if pss else "")
    if report["bandwidth_share"]:
        yield (
            "memory bandwidth",
            f"{report['bandwidth_gb_s']:,.1f} GB/s read at most; decoding reads {report['read_bytes_per_step'] / 1e6:,.1f} MB "
            f"of weights a token: {report['bandwidth_share']:.0%}",
        )
    if report["energy_j"] is not None and report["tokens"]:
        yield "energy", f"{report['energy_j']:,.1f} J, {report['energy_j'] / report['tokens']:.3f} J a token"
    if quality := report["quality"]:
        gate = "passed" if quality["passed"] else "not passed"
        yield (
            "quality",
            f"KL {quality['kld_mean']:.4f} nats, best token agrees {quality['top1_agreement']:.1%}, gate {gate}",
        )


def _scaling(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    base = (report["scaling"] or [None])[0]
    for found in report["scaling"] or ():
        parts = []
        for name in ("prefill", "decode"):
            rate, first = found[f"{name}_tokens_per_s"], base[f"{name}_tokens_per_s"]
            if rate:
                parts.append(f"{name} {rate['p50']:,.1f} tokens/s ({rate['p50'] / first['p50']:.2f}×)")
        yield f"{found['threads']} thread{'s' * (found['threads'] != 1)}", ", ".join(parts)


def _stress(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if stress := report["stress"]:
        yield (
            "under stress",
            f"all numbers are of rounds beside {stress['processes']} busy process{'es' * (stress['processes'] != 1)}",
        )
        for found in stress["workloads"]:
            span = f" ({found['ci95'][0]:.2f} to {found['ci95'][1]:.2f})" if found["ci95"] else ""
            yield (
                f"kept in {found['workload']}",
                f"{found['kept']:.2f} of the speed without them{span}; an even share is {stress['fair_share']:.2f}",
            )


def _comparison(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if found := report["comparison"]:
        yield "compared with", found["baseline"] + (", in turn" if found["interleaved"] else ", measured before")
        for text in found["verdict"]:
            yield "verdict", text
        for text in found["faults"]:
            yield "fault", text
        for text in found["notes"]:
            yield "note", text


def _rate(found: dict[str, Any]) -> str:
    return f"{found['p50']:,.1f} tokens/s{_mean(found, 1)}"


def _percentiles(found: dict[str, Any], digits: int) -> str:
    shares = ", ".join(f"{name} {found[name]:,.{digits}f} ms" for name in ("p50", "p95", "p99"))
    return shares + _mean(found, digits)


def _mean(found: dict[str, Any], digits: int) -> str:
    """The interval of a mean; what is measured is never below 0, so of few rounds it is cut there."""
    if not found["ci95"]:
        return ""
    return f" (mean {max(found['ci95'][0], 0):,.{digits}f} to {found['ci95'][1]:,.{digits}f})"


def _span(found: dict[str, Any]) -> str:
    return f"{_short(max(found['ci95'][0], 0))} to {_short(found['ci95'][1])}" if found["ci95"] else ""


CSV_HEAD = ("workload", "round", "client", "turn", "metric", "token", "value")


def as_csv(report: dict[str, Any]) -> str:
    """Every sample as CSV, a number a row under the name that it has in JSON.

    `round`, `client`, `turn` and `token` are counted from 1; `token` is empty but for `ttft_ms` (1) and `itl_ms` (from 2).
    """
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(CSV_HEAD)
    for sample in report["samples"]:
        where = sample["workload"], sample["round"], sample.get("client", 1), sample.get("turn", 1)
        for name, value in sample.items():
            if name == "itl_ms":
                lines.writerows([*where, name, token, ms] for token, ms in enumerate(value, 2))
            elif isinstance(value, int | float) and name not in ("round", "client", "turn"):
                lines.writerow([*where, name, 1 if name == "ttft_ms" else "", value])
    return text.getvalue()


def measured_with(report: dict[str, Any]) -> list[tuple[str, str]]:
    """What a report was measured with: rows of what and value."""
    machine, memory, load = report["hardware"], report["hardware"]["memory"], report["load_average"]
    cpu, profile = machine["cpu"], report["device_profile"]
    return [
        ("processor", f"{cpu['model']}, {cpu['physical_cores']} cores, {cpu['logical_cores']} logical"),
        ("instruction sets", ", ".join(cpu["instruction_sets"])),
        ("frequency governor", machine["governor"] or "not told"),
        ("memory", f"{memory['total_mb']:,} MB, {memory['available_mb']:,} MB available before"),
        ("read bandwidth", f"{report['bandwidth_gb_s']:,.1f} GB/s" if report["bandwidth_gb_s"] else "not measured"),
        ("system", f"{machine['os']}, {machine['kernel']}, Python {machine['python']}"),
        ("load average (1, 5, 15 min)", f"{load['before']} before, {load['after']} after"),
        ("device profile", str(profile) if profile else "none"),
        *report["versions"].items(),
    ]


def as_markdown(report: dict[str, Any]) -> str:
    """The report as a markdown page."""
    lines = [f"# Benchmark of {report['artifact']}", "", *_markdown_table(table(report))]
    if compared := report["comparison"]:
        lines += ["", f"## Each metric of {compared['name']}", "", *_markdown_table(metrics(report), METRIC_HEAD)]
        lines += ["", f"## Each metric of {compared['baseline']}", ""]
        lines += _markdown_table(metrics(compared["report"]), METRIC_HEAD)
    else:
        lines += ["", "## Each metric", "", *_markdown_table(metrics(report), METRIC_HEAD)]
    lines += ["", "## Measured with", "", *_markdown_table(measured_with(report))]
    if report["files"]:
        files = [(name, f"`{value}`") for name, value in report["files"].items()]
        lines += ["", "## Files", "", *_markdown_table(files)]
    return "\n".join(lines) + "\n"


def _markdown_table(rows: Sequence[Sequence[str]], head: Sequence[str] = ("", "")) -> list[str]:
    lines = [head, ["---"] * len(head), *([cell.strip().replace("|", "/") for cell in row] for row in rows)]
    return ["|" + "|".join(f" {cell} " if cell else " " for cell in line) + "|" for line in lines]
