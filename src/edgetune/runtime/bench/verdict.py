"""Two reports: how many times as fast one is as the other, how sure that is, and what else differs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any
from urllib.parse import urlsplit

from edgetune.errors import GateError, InputError
from edgetune.runtime.bench.statistics import Ratio, ratio

_WIDE = 1.25  # an interval from which nothing can be said: its end over its beginning
_PLACE = ("round", "client", "turn", "prompt_sha256")  # what tells samples of a workload apart
Report = dict[str, Any]


def _first(sample: dict[str, Any]) -> float | None:
    return 1e3 / sample["ttft_ms"] if sample["ttft_ms"] else None


# Services count prompts' tokens differently, or not at all, and one that others wait for reads them later.
_SPEEDS: dict[str, dict[str, Callable[[dict[str, Any]], float | None]]] = {
    "artifact": {"prefill": lambda s: s["prefill_tokens_per_s"], "decode": lambda s: s["decode_tokens_per_s"]},
    "http": {"first token": _first, "decode": lambda s: s["decode_tokens_per_s"]},
}


def against(report: Report, before: Report, interleaved: bool) -> Report:
    """The `comparison` of a report with another one, of the same kind of target.

    Raises:
        InputError: they have no workload in common.
    """
    names = _names(report, before)
    speeds = _SPEEDS[report["target"]["kind"]]
    theirs = {entry["name"]: entry for entry in before["workloads"]}
    ratios: list[dict[str, Any]] = []
    verdict: list[str] = []
    notes: list[str] = []
    faults: list[str] = []
    for entry in report["workloads"]:
        name = entry["name"]
        at = f"{name}: " if len(report["workloads"]) > 1 else ""
        if theirs.pop(name, None) is None:
            notes.append(f"{name} was measured of {names[0]} only")
            continue
        for what, speed in speeds.items():
            if found := _ratio(report, before, name, speed, interleaved):
                ratios.append({"workload": name, "what": what, **asdict(found)})
                verdict.append(at + words(found, what, *names))
        if entry.get("errors"):
            faults.append(f"{at}{entry['errors']} of {entry['requests']} requests of {names[0]} failed")
        if _others(report, before, name):
            if _same_run(report, before):
                faults.append(f"{at}the produced tokens differ, though the files are the same: one answers wrongly")
            else:
                notes.append(f"{at}the produced {'texts' if report['files'] is None else 'tokens'} differ")
    faults += [f"{name} was measured of {names[1]} only" for name in theirs]
    if not ratios:
        raise InputError("the two have no workload in common", where="--compare", fix="measure both on the same work")
    if report["peak_rss_mb"] and before["peak_rss_mb"]:
        sizes = [f"{found['peak_rss_mb']:,.0f}" for found in (report, before)]
        verdict.append(f"{names[0]} takes {sizes[0]} MB of memory, {names[1]} {sizes[1]} MB")
    return {
        "name": names[0],
        "baseline": names[1],
        "interleaved": interleaved,
        "ratios": ratios,
        "verdict": verdict,
        "notes": [*notes, *_differences(report, before), *_warnings(report, before, names[1])],
        "faults": faults,
        "report": before,
    }


def _names(report: Report, before: Report) -> tuple[str, str]:
    """Names to tell them apart by."""
    first, second = report["artifact"], before["artifact"]
    if report["target"]["kind"] == "http":
        first, second = (
            f"{found['artifact']} at {urlsplit(found['target']['url']).netloc}" for found in (report, before)
        )
        return (first, second) if first != second else (f"{first} (now)", f"{second} (baseline)")
    if first != second:
        return first, second
    if _same_files(report, before):
        return f"{first} (now)", f"{second} (baseline)"
    return f"{first} ({report['size_mb']:,.0f} MB)", f"{second} (baseline, {before['size_mb']:,.0f} MB)"


def _same_files(report: Report, before: Report) -> bool:
    def hashes(found: Report) -> dict[str, str]:
        return {name: value for name, value in (found["files"] or {}).items() if not name.endswith(".md")}

    return bool(hashes(report)) and hashes(report) == hashes(before)


def _same_run(report: Report, before: Report) -> bool:
    """Whether the tokens of two measurements should be the same: files, adapter, provider and guessing are."""
    keys = ("provider", "adapter", "speculation")
    told = [{key: found["target"][key] for key in keys if key in found["target"]} for found in (report, before)]
    return _same_files(report, before) and all(told[0][key] == told[1][key] for key in told[0].keys() & told[1].keys())


def _others(report: Report, before: Report, name: str) -> bool:
    """Whether the same prompts of a workload gave other tokens; of samples that do not tell, whether as many rounds did."""
    answers = [
        {
            tuple(sample.get(key) for key in _PLACE): sample.get("tokens_sha256") or sample.get("text_sha256")
            for sample in found["samples"]
            if sample["workload"] == name
        }
        for found in (report, before)
    ]
    common = [key for key in answers[0] if key in answers[1] and answers[0][key] and answers[1][key]]
    if common:
        return any(answers[0][key] != answers[1][key] for key in common)
    both = [next(entry for entry in found["workloads"] if entry["name"] == name) for found in (report, before)]
    return bool(both[0]["rounds"] == both[1]["rounds"] and both[0]["tokens_sha256"] != both[1]["tokens_sha256"])


def _ratio(
    report: Report, before: Report, name: str, speed: Callable[[dict[str, Any]], float | None], paired: bool
) -> Ratio | None:
    both = [_rates(found, name, speed) for found in (report, before)]
    if not all(both):
        return None
    if paired and both[0].keys() == both[1].keys():
        return ratio([both[0][n] for n in both[0]], [both[1][n] for n in both[0]], paired=True)
    return ratio(list(both[0].values()), list(both[1].values()), paired=False)


def _rates(report: Report, name: str, speed: Callable[[dict[str, Any]], float | None]) -> dict[int, float]:
    """The speed of each round: the harmonic mean of its samples."""
    found: dict[int, list[float]] = {}
    for sample in report["samples"]:
        if sample["workload"] == name and (rate := speed(sample)):
            found.setdefault(sample["round"], []).append(rate)
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


def _differences(report: Report, before: Report) -> list[str]:
    """What else than the artifacts differs between two measurements."""
    found = []
    machines = [each["hardware"]["cpu"]["model"] for each in (report, before)]
    if machines[0] != machines[1]:
        found.append(f"measured on different processors: {machines[0]}, {machines[1]}")
    for key, what in (("threads", "threads"), ("device_profile", "device profiles")):
        if report[key] != before.get(key):
            found.append(f"different {what}: {report[key]}, {before.get(key)}")
    for key in ("provider", "adapter", "speculation"):
        values = [each["target"].get(key) for each in (report, before)]
        if key in before["target"] and values[0] != values[1]:
            found.append(f"different {key}: {values[0] or 'none'}, {values[1] or 'none'}")
    versions = {name: value for name, value in before.get("versions", {}).items() if "onnxruntime" in name}
    for name, value in versions.items():
        if report["versions"].get(name) != value:
            found.append(f"{name} {report['versions'].get(name)} now, {value} then")
    if before.get("stress") != report["stress"] and bool(before.get("stress")) != bool(report["stress"]):
        found.append("one of them was measured under stress")
    return found


def _warnings(report: Report, before: Report, name: str) -> list[str]:
    """What makes the baseline's numbers doubtful."""
    return [f"{name}: {text}" for text in before.get("warnings", ()) if text not in report["warnings"]]


def check(comparison: dict[str, Any], limit: float) -> None:
    """Raise GateError where a ratio is below `limit`, tokens are wrong, or a workload is missing."""
    missed = [found for found in comparison["ratios"] if found["value"] < limit]
    said = [*comparison["faults"]]
    if missed:
        told = "; ".join(_told(found, limit) for found in missed)
        said.insert(0, f"slower than {limit} times {comparison['baseline']}: {told}")
    if said:
        fix = "see what changed, or lower the limit"
        if comparison["faults"]:
            fix = "measure the same work with the same threads and versions; if that was so, see what went wrong"
        raise GateError("; ".join(said), where="--fail-below", fix=fix)


def _told(found: dict[str, Any], limit: float) -> str:
    text = f"{found['workload']} {found['what']} {found['value']:.3f}"
    if found["high"] is None:
        return f"{text}, in one round"
    unsure: Sequence[str] = [", so more rounds may say otherwise"] if found["high"] >= limit else []
    return f"{text} ({found['low']:.3f} to {found['high']:.3f}{''.join(unsure)})"
