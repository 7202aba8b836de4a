"""Benchmark: how fast an artifact answers on this hardware, and what it takes.

The measurement runs in a fresh process (`bench_worker`), so that load time and peak memory are those of a
program that does nothing but answer. The terms are those of benchmarks for language model services:

- time to first token (TTFT): from the prompt's token ids to the first new one, making the KV cache included;
- inter-token latency (ITL): from one new token to the next;
- prefill rate: prompt tokens / TTFT; decode rate: (new tokens - 1) / sum of the ITL.
"""

from __future__ import annotations

import csv
import io
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from edgetune import progress
from edgetune.errors import EdgetuneError, InputError
from edgetune.files import digest, folder_size, write_json, write_text
from edgetune.recipe import BenchSection
from edgetune.runtime.hardware import hardware, load_average, versions

FORMAT = "edgetune/bench/1"
_SPREAD = 0.25  # noise: the fastest round's decode rate over the slowest's, as a share of the median
_OTHERS = 0.1  # noise: what other programs use of all cores
_COMMAND = (sys.executable, "-P", "-m", "edgetune.runtime.bench_worker")


def bench(artifact: Path, section: BenchSection, out: Path | None = None) -> dict[str, Any]:
    """Measure an artifact.

    Args:
        artifact: an artifact or a run folder.
        section: lengths, rounds, threads.
        out: folder that gets report.json, report.csv (every sample) and report.md; None writes nothing.

    Returns:
        The report. Times in ms or s, sizes in MB (10^6 bytes):
        ttft_ms, itl_ms, prefill_tokens_per_s, decode_tokens_per_s: each p50, p95, p99, mean, min, max;
        load_s: of graph, weights and tokenizer, from the page cache, as checking the hashes (verify_s) read
        the files; peak_rss_mb: of the measuring process; size_mb: of the whole folder;
        tokens: how many the counted rounds gave; tokens_sha256: hash of their ids, equal from run to run on
        a machine; samples: each counted round; warnings: what makes the numbers doubtful;
        and what they were measured with: threads, hardware, versions, load_average, others_busy_cores, files.

    Raises:
        InputError: no sound artifact, or prompt and answer do not fit into its context.
        EdgetuneError: the measuring process died.
    """
    _writable(out, artifact)
    before = load_average()
    machine = hardware()
    once, rounds = _run_worker({"artifact": str(artifact.absolute()), **section.model_dump()})
    folder = Path(once.pop("folder"))
    counted = [found for found in rounds if found.pop("counted")]
    tokens = [found.pop("tokens") for found in counted]
    for found in counted:
        found["prefill_tokens_per_s"] = round(section.prompt_tokens / found["ttft_ms"] * 1e3, 3)
        found["decode_tokens_per_s"] = round((section.new_tokens - 1) / sum(found["itl_ms"]) * 1e3, 3)
    report = {
        "format": FORMAT,
        **once,
        "size_mb": round(folder_size(folder) / 1e6, 2),
        **section.model_dump(exclude={"threads"}),
        "ttft_ms": _summary([found["ttft_ms"] for found in counted]),
        "itl_ms": _summary([value for found in counted for value in found["itl_ms"]]),
        "prefill_tokens_per_s": _summary([found["prefill_tokens_per_s"] for found in counted]),
        "decode_tokens_per_s": _summary([found["decode_tokens_per_s"] for found in counted]),
        "tokens": sum(map(len, tokens)),
        "tokens_sha256": digest(tokens),
        "load_average": {"before": before, "after": load_average()},
        "hardware": {name: value for name, value in machine.items() if name != "load_average"},
        "versions": versions(),
        "samples": counted,
    }
    report["warnings"] = _noise(report)
    if out:
        write_json(out / "report.json", report)
        write_text(out / "report.csv", as_csv(report))
        write_text(out / "report.md", as_markdown(report))
    return report


def _writable(out: Path | None, artifact: Path) -> None:
    """Refuse a wrong folder before the measurement, not after it."""
    if out and out.exists() and not out.is_dir():
        raise InputError("is not a folder", where=out, fix="choose another folder for the report")
    if out and out.resolve().is_relative_to(artifact.resolve()):
        raise InputError("lies inside what is measured", where=out, fix="choose a folder outside it")


def table(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The report for people: rows of what and value."""
    cpu, threads = report["hardware"]["cpu"], f"{report['threads']} thread{'s' * (report['threads'] != 1)}"
    rounds = f"{report['repetitions']} after {report['warmup']} to warm up"
    decode = report["decode_tokens_per_s"]
    return [
        ("artifact", f"{report['artifact']}, {report['size_mb']:,.1f} MB"),
        ("measured on", f"{cpu['model']}, {cpu['usable_cores']} cores, {threads}"),
        ("rounds", f"{rounds}, {report['prompt_tokens']} prompt tokens, {report['new_tokens']} new tokens"),
        ("time to first token", _percentiles(report["ttft_ms"], 1)),
        ("prefill", f"{report['prefill_tokens_per_s']['p50']:,.1f} tokens/s"),
        ("decode", f"{decode['p50']:,.1f} tokens/s ({decode['min']:,.1f} to {decode['max']:,.1f})"),
        ("inter-token latency", _percentiles(report["itl_ms"], 2)),
        ("load", f"{report['load_s']:.2f} s, after {report['verify_s']:.2f} s to check the hashes"),
        ("peak memory", f"{report['peak_rss_mb']:,.1f} MB"),
        ("tokens", f"{report['tokens']:,}, SHA-256 {report['tokens_sha256'][:16]}…"),
        *(("warning", text) for text in report["warnings"]),
    ]


def _percentiles(found: dict[str, float], digits: int) -> str:
    return ", ".join(f"{name} {found[name]:,.{digits}f} ms" for name in ("p50", "p95", "p99"))


def as_csv(report: dict[str, Any]) -> str:
    """Every sample as CSV: round and token counted from 1; token 1's time is the time to first token."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["round", "token", "ms"])
    for number, sample in enumerate(report["samples"], 1):
        times = [sample["ttft_ms"], *sample["itl_ms"]]
        lines.writerows([number, token, ms] for token, ms in enumerate(times, 1))
    return text.getvalue()


def as_markdown(report: dict[str, Any]) -> str:
    """The report as a markdown page."""
    machine, memory, load = report["hardware"], report["hardware"]["memory"], report["load_average"]
    shown = {
        "instruction sets": ", ".join(machine["cpu"]["instruction_sets"]),
        "memory": f"{memory['total_mb']:,} MB, {memory['available_mb']:,} MB available before",
        "system": f"{machine['os']}, {machine['kernel']}, Python {machine['python']}",
        "load average (1, 5, 15 min)": f"{load['before']} before, {load['after']} after",
        **report["versions"],
    }
    return (
        "\n".join(
            [
                f"# Benchmark of {report['artifact']}",
                "",
                *_markdown_table(table(report)),
                "",
                "## Measured with",
                "",
                *_markdown_table(list(shown.items())),
                "",
                "## Files",
                "",
                *_markdown_table([(name, f"`{value}`") for name, value in report["files"].items()]),
            ]
        )
        + "\n"
    )


def _markdown_table(rows: Sequence[tuple[str, str]]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {what} | {value.replace('|', '/')} |" for what, value in rows)]


def _summary(values: Sequence[float]) -> dict[str, float]:
    """Percentiles (linear between samples), mean and range."""
    import numpy as np

    found: dict[str, Any] = {f"p{share}": np.percentile(values, share) for share in (50, 95, 99)}
    found |= {"mean": np.mean(values), "min": min(values), "max": max(values)}
    return {name: round(float(value), 4) for name, value in found.items()}


def _noise(report: dict[str, Any]) -> list[str]:
    """What makes the numbers doubtful.

    The load average is no sign: it also holds what edgetune itself did just before. So it is measured what
    other programs use during the rounds.
    """
    found = []
    cores, others = report["hardware"]["cpu"]["logical_cores"], report["others_busy_cores"]
    decode = report["decode_tokens_per_s"]
    if others and others > _OTHERS * cores:
        found.append(f"other programs used {others:.1f} of {cores} cores meanwhile; close them, measure again")
    spread = (decode["max"] - decode["min"]) / decode["p50"]
    if spread > _SPREAD:
        found.append(f"decode rates differ by {spread:.0%} between rounds; measure more of them")
    return found


def _run_worker(job: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run the measuring process, which never outlives this call. Returns its result and its rounds."""
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        worker = subprocess.Popen(
            [*_COMMAND, json.dumps(job)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
        )
        assert worker.stdout is not None
        try:
            with progress.task("bench", total=job["warmup"] + job["repetitions"]) as shown:
                for line in worker.stdout:
                    message = json.loads(line)
                    if "round" in message:
                        rounds.append(message["round"])
                        shown.advance(note=f"{1e3 / _mean(rounds[-1]['itl_ms']):.1f} tokens/s")
                    elif "error" in message:
                        raise _explained(**message["error"])
                    else:
                        return message["result"], rounds
                raise _died(worker.wait(), errors)
        finally:
            worker.kill()  # does nothing where it has ended
            worker.wait()
            worker.stdout.close()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _explained(kind: str, what: str, where: str | None, fix: str | None) -> EdgetuneError:
    return (InputError if kind == "input" else EdgetuneError)(what, where=where, fix=fix)


def _died(code: int, errors: IO[str]) -> EdgetuneError:
    errors.seek(0)
    tail = "\n  ".join(errors.read().strip().splitlines()[-8:])
    how, fix = f"exit code {code}", "run it again with --threads 1; `edgetune doctor` checks the installation"
    if code < 0:
        how = signal.Signals(-code).name
        if how == "SIGKILL":
            how += ", as the system does when memory runs out"
            fix = "close other programs, lower prompt_tokens, or take a smaller model or precision"
        elif how == "SIGILL":
            fix = "the installed ONNX Runtime needs instructions that this processor lacks"
    what = f"the measuring process ended before its work was done ({how})"
    return EdgetuneError(f"{what}\n  {tail}" if tail else what, where="bench", fix=fix)
