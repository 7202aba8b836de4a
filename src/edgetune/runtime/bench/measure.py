"""Benchmark: how fast an artifact answers on this hardware, and what it takes.

The measurement runs in fresh processes (`worker`), so that load time and peak memory are those of a program that does
nothing but answer. The terms are those of benchmarks for language model services:

- time to first token (TTFT): from the prompt's token ids to the first new one, making the KV cache included;
- inter-token latency (ITL): from one new token to the next; time per output token (TPOT): its mean over an answer;
- end to end (E2E): tokenization, all of that, and making text of the tokens;
- prefill rate: prompt tokens / TTFT; decode rate: tokens after the first / sum of the ITL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgetune.errors import GateError, InputError
from edgetune.files import digest, folder_size, write_json, write_text
from edgetune.recipe import BenchOptions, BenchSection
from edgetune.runtime.bench.page import as_html
from edgetune.runtime.bench.process import Job, Worker, drop_from_cache
from edgetune.runtime.bench.report import FORMAT, entry, fair_share, flat, machine_now, noise, quality, siblings, top
from edgetune.runtime.bench.schedule import Run, take_turns
from edgetune.runtime.bench.statistics import ratio, summary
from edgetune.runtime.bench.text import as_csv, as_markdown
from edgetune.runtime.bench.traffic import weight_bytes
from edgetune.runtime.bench.workloads import Workload, check_guessing, fitted, left_out, parse
from edgetune.runtime.hardware import bandwidth_gb_s, hardware, load_average, versions


def bench(
    artifact: Path, section: BenchSection, out: Path | None = None, options: BenchOptions | None = None
) -> dict[str, Any]:
    """Measure an artifact.

    Args:
        artifact: an artifact or a run folder.
        section: lengths, rounds, threads.
        out: folder that gets report.json, report.csv (every sample), report.md and report.html; None writes nothing.
        options: further workloads and ways; None: one prompt and answer of the section's lengths, no load times but
            that of the measuring process.

    Returns:
        The report, as `schema.json` describes it. Times in ms or s, sizes in MB (10^6 bytes). What does not fit into the
        artifact's context is left out, with a warning.

    Raises:
        InputError: no sound artifact, no such adapter, a missing provider, or nothing of the work fits into its context.
        EdgetuneError: the measuring process died.
    """
    writable(out, artifact)
    options = options or BenchOptions(loads=0)
    counts = options.threads or (section.threads,)
    jobs = [job(artifact, threads, options, options.adapter) for threads in counts]
    reports = measured(jobs, section, options)
    report = max(reports, key=_speed)
    if len(reports) > 1:
        report["scaling"] = [_scaled(found) for found in reports]
    write(report, out)
    return report


def job(artifact: Path, threads: int | None, options: BenchOptions, adapter: str | None) -> Job:
    """How an artifact is run, as the options have it."""
    how: dict[str, Any] = {name: getattr(options, name) for name in ("use_profile", "speculation", "exact")}
    return Job(artifact, threads, options.provider, adapter=adapter, **how)


def measured(jobs: Sequence[Job], section: BenchSection, options: BenchOptions) -> list[dict[str, Any]]:
    """Reports of several ways of running an artifact, or of several artifacts, measured in turn."""
    asked = parse(options.workloads, options.depths, options.batch_sizes, options.prompts, section)
    check_guessing(asked, options)
    if any(work.file for work in asked):
        from edgetune.runtime.bench.prompts import read_prompts

        read_prompts(Path(str(options.prompts)))  # what is wrong with them is said before anything is loaded
    notes: list[str] = []

    def works(context: int) -> list[Workload]:
        found, cut = fitted(asked, context, str(jobs[0].artifact))
        notes[:] = cut
        return found

    before, machine = load_average(), hardware()
    runs = take_turns(jobs, works, section.warmup, section.repetitions, options.stress)
    loads = [_loads(run, options.loads) if options.loads else None for run in runs]
    around = {"hardware": machine_now(machine), "bandwidth_gb_s": round(bandwidth_gb_s(), 2)}
    averages = {"before": before, "after": load_average()}
    reports = []
    for run, load in zip(runs, loads, strict=True):
        report = _report(run, section, around)
        report["load"], report["load_average"] = load, averages
        missed = [left_out(name, error.what) for name, error in run.missed.items()]
        report["warnings"] = [*notes, *missed, *report["warnings"]]
        if options.stress:
            report["stress"] = _stressed(run, options.stress, float(machine["cpu"]["usable_cores"]))
        reports.append(report)
    return reports


def _report(run: Run, section: BenchSection, around: dict[str, Any]) -> dict[str, Any]:
    facts, folder = run.facts, Path(run.facts["folder"])
    read_bytes = weight_bytes(folder / facts["graph"]) if facts["graph"] else None
    entries, samples = [], []
    for work in run.works:
        found, rounds = entry(work, read_bytes, around["bandwidth_gb_s"])
        entries.append(found)
        samples += flat(found["name"], rounds)
    tokens = [sample["tokens"] for work in run.works for part in work.rounds for sample in part]
    cores = around["hardware"]["cpu"]["logical_cores"]
    report = {
        "format": FORMAT,
        "artifact": facts["artifact"],
        "target": {"kind": "artifact", **{key: facts[key] for key in ("provider", "adapter", "speculation")}},
        "files": facts["files"],
        "size_mb": round(folder_size(folder) / 1e6, 2),
        "verify_s": facts["verify_s"],
        "load_s": facts["load_s"],
        "threads": facts["threads"],
        "warmup": section.warmup,
        "repetitions": section.repetitions,
        **top(entries),
        "peak_rss_mb": max(found["peak_rss_mb"] for found in entries),
        "peak_pss_mb": max((found["peak_pss_mb"] for found in entries if found["peak_pss_mb"]), default=None),
        "energy_j": sum(found["energy_j"] for found in entries)
        if all(e["energy_j"] is not None for e in entries)
        else None,
        "read_bytes_per_step": read_bytes,
        "tokens": sum(found["tokens"] for found in entries),
        "tokens_sha256": digest(tokens),
        "device_profile": facts.get("device_profile"),
        **around,
        "versions": versions(),
        "quality": quality(folder),
        "workloads": entries,
        "memory": run.memory,
        "samples": samples,
        "warnings": noise(entries, cores),
        "scaling": None,
        "stress": None,
        "comparison": None,
    }
    report["siblings"] = siblings(folder, report)
    return report


def _loads(run: Run, times: int) -> dict[str, Any]:
    """Seconds of checking the hashes and loading, in fresh processes: with the files on disk only, and in the page cache."""
    folder = Path(run.facts["folder"])
    files = [folder / name for name in run.facts["files"]]
    cold: list[float] = []
    warm: list[float] = []
    note = None
    for _ in range(times):
        note = note or drop_from_cache(files)
        for kept in (cold, warm):
            if kept is warm or note is None:
                with Worker(replace(run.job, session=False)) as worker:
                    facts = worker.opened()
                kept.append(round(facts["verify_s"] + facts["load_s"], 3))
    return {
        "cold_s": summary(cold) if cold and note is None else None,
        "warm_s": summary(warm),
        "note": note,
        "samples": {"cold_s": cold if note is None else [], "warm_s": warm},
    }


def _speed(report: dict[str, Any]) -> float:
    rates = report["decode_tokens_per_s"] or report["prefill_tokens_per_s"]
    return float(rates["p50"]) if rates else 0.0


def _scaled(report: dict[str, Any]) -> dict[str, Any]:
    keys = ("threads", "prefill_tokens_per_s", "decode_tokens_per_s", "peak_rss_mb", "tokens_sha256")
    return {key: report[key] for key in keys}


def _stressed(run: Run, busy: int, cores: float) -> dict[str, Any]:
    """What the busy processes beside took of each workload's speed, and what an even share would have left."""
    found = []
    for work in run.works:
        both = [[_round_rate(part) for part in rounds] for rounds in (work.rounds, work.quiet)]
        kept = ratio(both[0], both[1], paired=True)
        found.append({"workload": work.work.name, "kept": round(kept.value, 4), "ci95": _span(kept.low, kept.high)})
    share = fair_share(run.facts["threads"], busy, cores)
    return {"processes": busy, "fair_share": round(share, 4), "workloads": found}


def _round_rate(samples: Sequence[dict[str, Any]]) -> float:
    """A round's speed as one over its time."""
    return 1.0 / sum((sample["ttft_ms"] or 0) + sum(sample["itl_ms"]) for sample in samples)


def _span(low: float | None, high: float | None) -> list[float] | None:
    return None if low is None or high is None else [round(low, 4), round(high, 4)]


def writable(out: Path | None, *measured: Path) -> None:
    """Refuse a wrong folder before the measurement, not after it."""
    if out and out.exists() and not out.is_dir():
        raise InputError("is not a folder", where=out, fix="choose another folder for the report")
    for artifact in measured:
        if out and artifact.is_dir() and out.resolve().is_relative_to(artifact.resolve()):
            raise InputError("lies inside what is measured", where=out, fix="choose a folder outside it")


def write(report: dict[str, Any], out: Path | None) -> None:
    """Write a report in all its forms."""
    if out:
        write_json(out / "report.json", report)
        write_text(out / "report.csv", as_csv(report))
        write_text(out / "report.md", as_markdown(report))
        write_text(out / "report.html", as_html(report))


def expect(report: dict[str, Any], sha256: str) -> None:
    """Raise GateError unless the produced tokens have this hash (or one that begins so)."""
    if not report["tokens_sha256"].startswith(sha256.lower()):
        raise GateError(
            f"the produced tokens have the SHA-256 {report['tokens_sha256']}, not {sha256}",
            where="--expect-tokens",
            fix="other lengths, rounds, weights, threads or processors give other tokens; if none of them changed, the answers are wrong",
        )
