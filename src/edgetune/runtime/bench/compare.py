"""Two artifacts, or one and a saved report: how many times as fast, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgetune.errors import GateError, InputError
from edgetune.recipe import BenchOptions, BenchSection
from edgetune.runtime.bench.measure import measured, writable, write
from edgetune.runtime.bench.process import Job
from edgetune.runtime.bench.report import read_report
from edgetune.runtime.bench.statistics import Ratio, ratio

_RATES = {"prefill": "prefill_tokens_per_s", "decode": "decode_tokens_per_s"}
_WIDE = 1.25  # an interval from which nothing can be said: its end over its beginning


def compare(
    artifact: Path,
    other: Path,
    section: BenchSection,
    out: Path | None = None,
    options: BenchOptions | None = None,
) -> dict[str, Any]:
    """Measure an artifact beside another one, round by round in turn, or against a report that was saved.

    Returns:
        The artifact's report; its `comparison` has the ratios with their intervals, the verdict in words, and the other
        one's report.

    Raises:
        InputError: see `measure.bench`; the saved report is none, or is of other work.
    """
    writable(out, artifact, other)
    options = options or BenchOptions()
    if len(options.threads) > 1:
        raise InputError("takes one number beside --compare", where="--threads", fix="sweep threads without it")
    if other.is_file():
        before = read_report(other)
        _same_work(before, other)
        report = measured([_job(artifact, section, options, options.adapter)], section, options)[0]
    else:
        jobs = [_job(path, section, options, on) for path, on in ((artifact, options.adapter), (other, None))]
        report, before = measured(jobs, section, options)
    report["comparison"] = against(report, before, interleaved=not other.is_file())
    write(report, out)
    return report


def _job(path: Path, section: BenchSection, options: BenchOptions, adapter: str | None) -> Job:
    threads = options.threads[0] if options.threads else section.threads
    return Job(path, threads, options.provider, use_profile=options.use_profile, adapter=adapter)


def _same_work(before: dict[str, Any], where: Path) -> None:
    if before["target"]["kind"] != "artifact":
        raise InputError("is of a service, not of an artifact", where=where, fix="give the report of an artifact")


def against(report: dict[str, Any], before: dict[str, Any], interleaved: bool) -> dict[str, Any]:
    """The `comparison` of a report with another one.

    Raises:
        InputError: they have no workload in common.
    """
    names = _names(report, before)
    ratios, verdict, notes = [], [], []
    theirs = {entry["name"]: entry for entry in before["workloads"]}
    for entry in report["workloads"]:
        other = theirs.get(entry["name"])
        if other is None:
            notes.append(f"{entry['name']} was measured of {names[0]} only")
            continue
        at = f"{entry['name']}: " if len(report["workloads"]) > 1 else ""
        for what, key in _RATES.items():
            found = _ratio(report, before, entry["name"], key, interleaved)
            if found:
                ratios.append({"workload": entry["name"], "what": what, **asdict(found)})
                verdict.append(at + words(found, what, *names))
        if entry["tokens_sha256"] != other["tokens_sha256"]:
            same = (
                "though the files are the same: one of the two answers wrongly" if _same_files(report, before) else ""
            )
            notes.append(f"{at}the produced tokens differ{', ' * bool(same)}{same}")
    if not ratios:
        raise InputError("the two have no workload in common", where="--compare", fix="measure both on the same work")
    notes += _differences(report, before)
    sizes = [f"{found['peak_rss_mb']:,.0f}" for found in (report, before)]
    verdict.append(f"{names[0]} takes {sizes[0]} MB of memory, {names[1]} {sizes[1]} MB")
    return {
        "name": names[0],
        "baseline": names[1],
        "interleaved": interleaved,
        "ratios": ratios,
        "verdict": verdict,
        "notes": notes,
        "report": before,
    }


def _names(report: dict[str, Any], before: dict[str, Any]) -> tuple[str, str]:
    """Names to tell them apart by."""
    first, second = report["artifact"], before["artifact"]
    if first != second:
        return first, second
    if _same_files(report, before):
        return f"{first} (now)", f"{second} (baseline)"
    return f"{first} ({report['size_mb']:,.0f} MB)", f"{second} (baseline, {before['size_mb']:,.0f} MB)"


def _same_files(report: dict[str, Any], before: dict[str, Any]) -> bool:
    def graphs(found: dict[str, Any]) -> dict[str, str]:
        return {name: value for name, value in found["files"].items() if name.endswith((".onnx", ".data", ".json"))}

    return graphs(report) == graphs(before)


def _ratio(report: dict[str, Any], before: dict[str, Any], name: str, key: str, paired: bool) -> Ratio | None:
    both = [_rates(found, name, key) for found in (report, before)]
    if not all(both):
        return None
    if paired and both[0].keys() == both[1].keys():
        return ratio([both[0][n] for n in both[0]], [both[1][n] for n in both[0]], paired=True)
    return ratio(list(both[0].values()), list(both[1].values()), paired=False)


def _rates(report: dict[str, Any], name: str, key: str) -> dict[int, float]:
    """The rate of each round: the harmonic mean of its samples."""
    found: dict[int, list[float]] = {}
    for sample in report["samples"]:
        if sample["workload"] == name and sample[key]:
            found.setdefault(sample["round"], []).append(sample[key])
    return {number: len(rates) / sum(1 / rate for rate in rates) for number, rates in found.items()}


def words(found: Ratio, what: str, first: str, second: str) -> str:
    """A ratio in words."""
    if found.low is None or found.high is None:
        return f"{first} ran at {found.value:.2f} times the speed of {second} in {what}, in one round: that says little"
    span = f"{found.low:.2f} to {found.high:.2f}"
    if found.low <= 1 <= found.high:
        if found.high / found.low > _WIDE:
            return f"{what} cannot be told apart ({span}): measure more rounds, on a quieter machine"
        return f"{what} is no different ({span})"
    if found.value > 1:
        return f"{first} is {found.value:.2f} times as fast as {second} in {what} ({span})"
    return f"{first} is slower than {second} in {what}: {found.value:.2f} times its speed ({span})"


def _differences(report: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """What else than the artifacts differs between two measurements."""
    found = []
    machines = [each["hardware"]["cpu"]["model"] for each in (report, before)]
    if machines[0] != machines[1]:
        found.append(f"measured on different processors: {machines[0]}, {machines[1]}")
    for key, what in (("threads", "threads"), ("device_profile", "device profiles")):
        if report[key] != before.get(key):
            found.append(f"different {what}: {report[key]}, {before.get(key)}")
    versions = {name: value for name, value in before.get("versions", {}).items() if "onnxruntime" in name}
    for name, value in versions.items():
        if report["versions"].get(name) != value:
            found.append(f"{name} {report['versions'].get(name)} now, {value} then")
    if before.get("stress") != report["stress"] and bool(before.get("stress")) != bool(report["stress"]):
        found.append("one of them was measured under stress")
    return found


def check(comparison: dict[str, Any], limit: float) -> None:
    """Raise GateError where a ratio is below `limit`."""
    missed = [found for found in comparison["ratios"] if found["value"] < limit]
    if missed:
        told = "; ".join(_told(found, limit) for found in missed)
        raise GateError(
            f"slower than {limit} times {comparison['baseline']}: {told}",
            where="--fail-below",
            fix="see what changed, or lower the limit",
        )


def _told(found: dict[str, Any], limit: float) -> str:
    text = f"{found['workload']} {found['what']} {found['value']:.3f}"
    if found["high"] is None:
        return f"{text}, in one round"
    unsure: Sequence[str] = [", so more rounds may say otherwise"] if found["high"] >= limit else []
    return f"{text} ({found['low']:.3f} to {found['high']:.3f}{''.join(unsure)})"
