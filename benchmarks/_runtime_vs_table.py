"""What the rounds of `runtime_vs.py` come to: the table, and the goals."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from edgetune.runtime.bench.statistics import Ratio, ratio

OURS, LLAMA, OPENVINO = "edgetune", "llama.cpp", "OpenVINO GenAI"
CLASS = 1.25  # files of which one is at most so many times as large as the other are of one size class
DECODE, PREFILL, LEVEL, LOAD_S = 1.4, 1.2, 0.97, 0.5
SHAPE = 1.1  # decode and prefill, of a large model's shape with random weights
Row = dict[str, Any]


def median(values: Sequence[float]) -> float | None:
    """The median; None of nothing."""
    return statistics.median(values) if values else None


def rivals(own: Row, rows: Sequence[Row]) -> list[Row]:
    """What others have of an artifact's size class and that ran."""
    return [
        row
        for row in rows
        if row["engine"] != OURS
        and row["decode"]
        and max(row["size_mb"], own["size_mb"]) <= CLASS * min(row["size_mb"], own["size_mb"])
    ]


def goals(own: Row, rows: Sequence[Row], shape: bool = False) -> list[tuple[bool, str]]:
    """The goals of an artifact against the others of its size class: whether each is met, and in words.

    None is met against what is closer to the merged model than ours is.

    Args:
        shape: weights are random, so that speeds alone are compared, with llama.cpp's.
    """
    others = rivals(own, rows)
    llama = [row for row in others if row["engine"] == LLAMA]
    openvino = [row for row in others if row["engine"] == OPENVINO]
    said: list[tuple[bool, str]] = []
    if not own["decode"]:
        return said
    wanted = [(others, "decode", DECODE), (llama, "prefill", PREFILL), (openvino, "prefill", LEVEL)]
    if shape:
        wanted = [(llama, "decode", SHAPE), (llama, "prefill", SHAPE)]
    for among, rate, goal in wanted:
        if not among:
            continue
        best = max(among, key=lambda row: float(median(row[rate]) or 0))
        found = ratio(own[rate], best[rate], paired=len(own[rate]) == len(best[rate]))
        words = f"{rate} {_times(found)} that of {best['name']}{'' if shape else _kl(own, best)}; goal: {goal:g} times"
        said.append((found.value >= goal and not _further(own, best), words))
    if shape:
        return said
    if own["warm_s"]:
        warm = float(median(own["warm_s"]) or 0)
        said.append((warm <= LOAD_S, f"loaded in {warm:.2f} s; goal: {LOAD_S:g} s"))
    if llama:
        least = min(llama, key=lambda row: float(row["memory"]["peak_rss_mb"]))
        mine, theirs = own["memory"]["peak_rss_mb"], least["memory"]["peak_rss_mb"]
        words = f"{mine:,.0f} MB resident at most, {least['name']} {theirs:,.0f} MB{_kl(own, least)}; goal: less"
        said.append((mine < theirs and not _further(own, least), words))
    return said


def _further(own: Row, other: Row) -> bool:
    """Whether ours is known to be further from the merged model."""
    mine, theirs = (row["quality"].get("kld_mean") for row in (own, other))
    return mine is not None and theirs is not None and mine > theirs


def _kl(own: Row, other: Row) -> str:
    """Whether the two may be compared: ours must not be further from the merged model."""
    mine, theirs = (row["quality"].get("kld_mean") for row in (own, other))
    if mine is None or theirs is None:
        return " (KL of one is not known)"
    word = "worse, so it does not count" if _further(own, other) else "no worse"
    return f" (KL {word}: {mine:.4f}, {theirs:.4f})"


def _times(found: Ratio) -> str:
    span = "" if found.low is None or found.high is None else f" ({found.low:.2f} to {found.high:.2f})"
    return f"{found.value:.2f} times{span}"


_HEAD = (
    "engine, model",
    "MB",
    "KL mean",
    "KL p99",
    "best token agrees",
    "prefill tokens/s",
    "decode tokens/s",
    "of the read bandwidth",
    "load s, warm (cold)",
    "peak MB resident",
    "MB proportional",
)
_BUSY = "decode kept beside busy programs"


def table(rows: Sequence[Row], bandwidth_gb_s: float, stressed: bool) -> str:
    """The rows as a Markdown table.

    Args:
        rows: `engine`, `name`, `size_mb`, `read_bytes`, `quality` (of `Scores.summary`, or empty) and the fields of
            `Measured` of each entry.
        bandwidth_gb_s: measured read bandwidth.
        stressed: whether there were rounds beside busy programs.
    """
    head = [*_HEAD, _BUSY] if stressed else list(_HEAD)
    cells = [_cells(row, bandwidth_gb_s, stressed) for row in rows]
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cells(row: Row, bandwidth_gb_s: float, stressed: bool) -> list[str]:
    quality, decode = row["quality"], median(row["decode"])
    share = decode * row["read_bytes"] / 1e9 / bandwidth_gb_s if decode and row["read_bytes"] else None
    cold = median(row["cold_s"])
    found = [
        row["name"],
        f"{row['size_mb']:.0f}",
        _number(quality.get("kld_mean"), ".4f"),
        _number(quality.get("kld_p99"), ".3f"),
        _number(quality.get("top1_agreement"), ".1%"),
        _number(median(row["prefill"]), ",.0f"),
        _number(decode, ".1f"),
        _number(share, ".0%"),
        _number(median(row["warm_s"]), ".2f") + (f" ({cold:.2f})" if cold is not None else ""),
        _number(row["memory"].get("peak_rss_mb"), ",.0f"),
        _number(row["memory"].get("pss_mb"), ",.0f"),
    ]
    if stressed:
        kept = ratio(row["busy"], row["quiet"], paired=False).value if row["busy"] else None
        found.append(_number(kept, ".0%") + (f", {median(row['busy']):.1f} tokens/s" if row["busy"] else ""))
    return found


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def text(result: dict[str, Any]) -> str:
    """All that is printed: what was measured where, the table, what the terms mean, the goals."""
    work, processor, rows = result["work"], result["cpu"], result["rows"]
    lines = [
        f"{result['date']}, {processor['model']}, {processor['usable_cores']:g} cores "
        f"({', '.join(processor['instruction_sets'])}); {'; '.join(result['engines'])}.",
        f"{work['merged']}, {work['threads']} threads; {work['prompt']} prompt and {work['new']} new tokens, medians of "
        f"{work['rounds']} rounds in turn; {_compared(work)}",
        "",
        table(rows, result["bandwidth_gb_s"], bool(work["stressed"])),
        "",
        f"Read bandwidth: {result['bandwidth_gb_s']:.1f} GB/s with all cores. Load: until a prompt can be given, the "
        "engine's import left out, ours with the check of all hashes.",
    ]
    if work["stressed"]:
        lines.append(f"Busy: {work['stressed']} programs that compute without end, short rounds with and without them.")
    busy = max((row["others"] or 0 for row in rows), default=0)
    if busy > 0.1:
        lines.append(f"Other programs kept up to {busy:.1f} cores busy meanwhile: the speeds are too low.")
    lines += result["notes"]
    for row in rows:
        if row["failed"]:
            lines.append(f"{row['name']}: {row['failed']}")
    shape = bool(work.get("shape"))
    for row in rows:
        if row["engine"] == OURS:
            among = ", ".join(rival["name"] for rival in rivals(row, rows)) or "nobody"
            lines += ["", f"{row['name']} ({row['size_mb']:.0f} MB; of its size class: {among})"]
            lines += [f"- {'met' if met else 'NOT MET'}: {said}" for met, said in goals(row, rows, shape)]
    return "\n".join(lines) + "\n"


def _compared(work: dict[str, Any]) -> str:
    if work.get("shape"):
        return "weights are random: nothing is said of quality."
    if not work["held_out"]:
        return "no rows compared with the merged model."
    return f"{work['compared']:,} tokens of {work['held_out']} held-out rows compared with the merged model in float32."
