"""From samples to a report: what `schema.json` describes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgetune.errors import InputError
from edgetune.files import digest, read_json
from edgetune.run import RunFolder
from edgetune.runtime.bench.schedule import Measured, Rounds
from edgetune.runtime.bench.statistics import summary
from edgetune.runtime.json_schema import misfit

FORMAT = "edgetune/bench/1"
SCHEMA = Path(__file__).with_name("schema.json")
TIMES = ("tokenization_ms", "prefill_ms", "sampling_ms", "decode_ms", "detokenization_ms")
METRICS = ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms", "prefill_tokens_per_s", "decode_tokens_per_s", *TIMES)
_SPREAD = 0.25  # noise: the fastest round's decode rate over the slowest's, as a share of the median
_OTHERS = 0.1  # noise: what other programs use of all cores
_LEAST_BYTES = 16 << 20  # fewer weights stay in a cache between two steps
_MOST_SIBLINGS = 24
_MOST = 1e15  # in a saved report: no time, rate or size is larger
_FREQUENCY = 0.1  # noise: the range of the cores' frequency between rounds, as a share of the highest


def schema() -> dict[str, Any]:
    """The JSON Schema of reports."""
    return dict(json.loads(SCHEMA.read_text(encoding="utf-8")))


def derived(sample: dict[str, Any], batch: int = 1) -> dict[str, Any]:
    """A sample with what follows from its times: rates over all rows of a batch, time per output token, end to end.

    decode_ms: a token's time without sampling it; sampling is timed on the first token, whose logits are there already.
    A session makes text of a token before the next one, so that goes off, too; where it guessed ahead, a token has no time
    of its own.
    """
    times, first = sample["itl_ms"], sample["ttft_ms"]
    tpot = sum(times) / len(times) if times else None
    found = dict(sample)
    found["prefill_tokens_per_s"] = _rate(batch * (sample["prompt_tokens"] or 0), first)
    found["decode_tokens_per_s"] = _rate(batch, tpot)
    found["tpot_ms"] = None if tpot is None else round(tpot, 4)
    sampling, whole = sample.get("sampling_ms"), found.get("e2e_ms") is not None
    if tpot is None or sampling is None or sample.get("drafted_tokens"):
        found["decode_ms"] = None
    else:
        text = sample["detokenization_ms"] / sample["new_tokens"] if whole else 0.0
        found["decode_ms"] = round(max(tpot - sampling - text, 0.0), 4)
    if not whole:
        around = (sample.get("tokenization_ms") or 0) + (sample.get("detokenization_ms") or 0)
        found["e2e_ms"] = None if first is None else round(around + first + sum(times), 3)
    return found


def _rate(tokens: float, ms: float | None) -> float | None:
    return (round(tokens / ms * 1e3, 3) or None) if ms and tokens else None


def summaries(rounds: Rounds) -> dict[str, Any]:
    """Each metric's summary over the samples of all rounds, None where nothing was measured of it.

    Args:
        rounds: derived samples.
    """
    found: dict[str, Any] = {}
    for name in METRICS:
        values = [_values(samples, name) for samples in rounds]
        pooled = [value for part in values for value in part]
        means = [sum(part) / len(part) for part in values if part]
        found[name] = summary(pooled, means) if pooled else None
    return found


def _values(samples: Sequence[dict[str, Any]], name: str) -> list[float]:
    if name == "itl_ms":
        return [ms for sample in samples for ms in sample["itl_ms"]]
    return [sample[name] for sample in samples if sample.get(name) is not None]


def entry(measured: Measured, read_bytes: int | None, bandwidth: float | None) -> tuple[dict[str, Any], Rounds]:
    """One workload of a report, and its derived samples.

    Args:
        read_bytes: weights that a decoding step reads.
        bandwidth: of the memory, GB/s.
    """
    work = measured.work
    rounds = [[derived(sample, work.batch) for sample in samples] for samples in measured.rounds]
    tokens = [sample["tokens"] for samples in rounds for sample in samples]
    found: dict[str, Any] = {
        "name": work.name,
        "kind": work.kind,
        "prompt_tokens": _lengths(rounds, "prompt_tokens"),
        "new_tokens": _lengths(rounds, "new_tokens"),
        "depth": work.depth,
        "batch": work.batch,
        "concurrency": None,
        "rounds": len(rounds),
        **summaries(rounds),
        "tokens": sum(len(row) for row in tokens if row and isinstance(row[0], int))
        + sum(len(row) for rows in tokens for row in rows if isinstance(row, list)),
        "tokens_sha256": digest(tokens),
        "peak_rss_mb": measured.peak_rss_mb,
        "peak_pss_mb": measured.peak_pss_mb,
        **measured.meter,
    }
    found["energy_j_per_token"] = per_token(found["energy_j"], found["tokens"])
    steps = found["tpot_ms"] and 1e3 / found["tpot_ms"]["p50"]
    from_memory = read_bytes is not None and read_bytes >= _LEAST_BYTES
    found["bandwidth_share"] = (
        round(read_bytes * steps / 1e9 / bandwidth, 4) if read_bytes and from_memory and bandwidth and steps else None
    )
    found["cached"] = cached_share(rounds)
    found["quoted"] = quoted_share(rounds)
    for name in ("drafted_tokens", "accepted_tokens"):
        counts = [sample[name] for samples in rounds for sample in samples if name in sample]
        found[name] = sum(counts) if counts else None
    if measured.quiet:
        quiet = [[derived(sample, work.batch) for sample in samples] for samples in measured.quiet]
        found["quiet"] = summaries(quiet)
    return found, rounds


def cached_share(rounds: Rounds) -> float | None:
    """The share of the prompts' tokens that were there from earlier prompts; None where that is not told."""
    told = [s for samples in rounds for s in samples if s.get("cached_tokens") is not None and s["prompt_tokens"]]
    read = sum(sample["prompt_tokens"] for sample in told)
    return round(sum(sample["cached_tokens"] for sample in told) / read, 4) if read else None


def quoted_share(rounds: Rounds) -> float | None:
    """The mean share of the answers that stands in their prompts; None where that is not asked."""
    found = [sample["quoted"] for samples in rounds for sample in samples if sample.get("quoted") is not None]
    return round(sum(found) / len(found), 4) if found else None


def _lengths(rounds: Rounds, name: str) -> int:
    """The median of what the samples had."""
    found = sorted(sample[name] or 0 for samples in rounds for sample in samples)
    return int(found[len(found) // 2]) if found else 0


def per_token(joules: float | None, tokens: int) -> float | None:
    """Joules a token; None where the energy is not known."""
    return round(joules / tokens, 5) if joules is not None and tokens else None


def top(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a report says first: each metric of the first workload that has it."""
    found: dict[str, Any] = {}
    for name in METRICS:
        found[name] = next((entry[name] for entry in entries if entry[name]), None)
    reads = next((entry for entry in entries if entry["ttft_ms"]), entries[0])
    writes = next((entry for entry in entries if entry["itl_ms"]), entries[0])
    found |= {"prompt_tokens": reads["prompt_tokens"], "new_tokens": writes["new_tokens"]}
    found["others_busy_cores"] = max(
        (entry["others_busy_cores"] for entry in entries if entry["others_busy_cores"] is not None), default=None
    )
    found["bandwidth_share"] = writes["bandwidth_share"]
    return found


def flat(name: str, rounds: Rounds) -> list[dict[str, Any]]:
    """Samples as a report keeps them: each with its workload and round, the tokens' hash in place of the tokens."""
    return [
        {
            "workload": name,
            "round": number,
            **{key: value for key, value in sample.items() if key != "tokens"},
            "tokens_sha256": digest(sample["tokens"]),
        }
        for number, samples in enumerate(rounds, 1)
        for sample in samples
    ]


def noise(entries: Sequence[dict[str, Any]], cores: int) -> list[str]:
    """What makes the numbers doubtful.

    The load average is no sign: it also holds what edgetune itself did just before. So it is measured what other
    programs use during the rounds.
    """
    found = []
    others = max((entry["others_busy_cores"] or 0 for entry in entries), default=0)
    if others > _OTHERS * cores:
        found.append(f"other programs used {others:.1f} of {cores} cores meanwhile; close them, measure again")
    for entry in entries:
        rates = entry["decode_tokens_per_s"] or entry["prefill_tokens_per_s"]
        what = "decode" if entry["decode_tokens_per_s"] else "prefill"
        spread = (rates["max"] - rates["min"]) / rates["p50"] if rates and entry["kind"] == "drawn" else 0
        if spread > _SPREAD:
            found.append(f"{entry['name']}: {what} rates differ by {spread:.0%} between rounds; measure more of them")
    spans = [entry["frequency_mhz"] for entry in entries if entry["frequency_mhz"]]
    if spans:
        low, high = min(span["min"] for span in spans), max(span["max"] for span in spans)
        if high and (high - low) / high > _FREQUENCY:
            found.append(f"the cores ran at {low:,.0f} to {high:,.0f} MHz; let them cool, or fix their frequency")
    if any(entry["throttled"] for entry in entries):
        found.append("cores were slowed down for heat meanwhile; let them cool, measure again")
    return found


def fair_share(threads: int, busy: int, cores: float) -> float:
    """What so many threads keep of their speed beside so many busy ones, where a processor is shared evenly."""
    alone = min(threads, cores)
    return min(1.0, threads * cores / (threads + busy) / alone)


def read_report(file: Path, kind: str) -> dict[str, Any]:
    """A report that was saved, of an `artifact` or of a service (`http`). Raises InputError where it is none."""
    report = read_json(file)
    fix = "give a report.json that `edgetune bench --out` wrote"
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise InputError(f"is not a report of the format {FORMAT!r}", where=file, fix=fix)
    if not isinstance(report.get("workloads"), list) or not isinstance(report.get("samples"), list):
        raise InputError("has no workloads and samples: it is of an older edgetune", where=file, fix="measure it again")
    if (wrong := misfit(report, schema()) or _unreal(report)) is not None:
        raise InputError(f"is no whole report: {wrong}", where=file, fix=fix)
    found = report["target"]["kind"]
    if found != kind:
        words = {"artifact": "an artifact", "http": "a service"}
        what = f"is of {words.get(found, found)}, not of {words[kind]}"
        raise InputError(what, where=file, fix=f"give the report of {words[kind]}, measured on the same work")
    return report


def _unreal(value: Any, place: str = "the report") -> str | None:
    """Where a number is endless, none at all, or beyond what anything measures; None where all are well."""
    if isinstance(value, dict | list):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        return next((wrong for name, each in parts if (wrong := _unreal(each, f"{name} in {place}"))), None)
    return f"{place} is {value!s:.12}" if isinstance(value, int | float) and not abs(value) < _MOST else None


def quality(folder: Path) -> dict[str, Any] | None:
    """What the run's `verify` said of this artifact; None where it lies in no run, was not verified, or is another one
    than the one that was."""
    file = folder.parent / "verify" / "report.json"
    if folder.name != "artifact" or not file.is_file() or not RunFolder(folder.parent).is_of_artifact("verify"):
        return None
    found = read_json(file)
    keys = ("kld_mean", "top1_agreement", "passed")
    return {key: found[key] for key in keys} if isinstance(found, dict) and set(keys) <= found.keys() else None


def siblings(folder: Path, report: dict[str, Any]) -> list[dict[str, Any]]:
    """Quality, speed and size of this artifact and of those of the runs beside its own, as their reports have them.

    Args:
        folder: the artifact.
        report: of this measurement, with its quality.
    """
    if report["quality"] is None:
        return []
    rate = report["decode_tokens_per_s"]
    now = {"decode_tokens_per_s": rate and rate["p50"], "size_mb": report["size_mb"], **report["quality"]}
    found = [{"name": folder.parent.name, "this": True, **now}]
    for file in sorted(folder.parent.parent.glob("*/bench/report.json"))[:_MOST_SIBLINGS]:
        other = file.parent.parent / "artifact"
        if not RunFolder(other.parent).is_of_artifact("bench"):
            continue
        try:
            theirs, said = read_json(file), quality(other)
            same = theirs["hardware"]["cpu"]["model"] == report["hardware"]["cpu"]["model"]
            speed, size = float(theirs["decode_tokens_per_s"]["p50"]), float(theirs["size_mb"])
        except (InputError, KeyError, TypeError, ValueError):
            continue  # a report that is broken is no matter here
        if said and same and other != folder:
            found.append(
                {"name": other.parent.name, "this": False, "decode_tokens_per_s": speed, "size_mb": size, **said}
            )
    return found


def machine_now(found: dict[str, Any]) -> dict[str, Any]:
    """`hardware()` as a report keeps it."""
    return {name: value for name, value in found.items() if name != "load_average"}
