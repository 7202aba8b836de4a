"""The plots of a report's page, each with its heading, a line of what it shows, and a legend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from edgetune.runtime.bench.plots import Axis, Plot, binned, legend, number, span

_WIDE = 8  # times from which on are drawn on a logarithmic axis
_MOST = 6  # workloads in one plot
_AT_ONCE = 0.05  # of an answer's mean: a token that came so soon came together with the one before it
Report = dict[str, Any]


def figures(report: Report) -> list[str]:
    """All that there is something to draw for, each a `<figure>`."""
    return [figure for draw in _FIGURES for figure in draw(report)]


def _figure(title: str, what: str, picture: str, names: Sequence[str] = (), styles: Sequence[str] = ()) -> str:
    shown = legend(names if len(names) > 1 else (), styles)
    return f"<figure><h3>{escape(title)}</h3><p>{escape(what)}</p>{picture}{shown}</figure>"


@dataclass(frozen=True)
class _Line:
    """A line of a plot: a workload's place among the colours, whose measurement it is, and what there is of it."""

    name: str
    colour: int
    baseline: bool
    samples: list[dict[str, Any]]

    def tip(self, styles: Sequence[str]) -> str:
        return f"{self.name}: {styles[self.baseline]}" if styles else self.name


def _styles(report: Report) -> list[str]:
    """Whose a whole line is and whose a dashed one; empty where nothing is compared."""
    compared = report["comparison"]
    return [compared["name"], compared["baseline"]] if compared else []


def _written(report: Report) -> list[_Line]:
    """Workloads that write tokens, up to six; those of the baseline beside them."""
    found: dict[str, list[dict[str, Any]]] = {}
    other: dict[str, list[dict[str, Any]]] = {}
    compared = report["comparison"]
    for kept, samples in ((found, report["samples"]), (other, compared["report"]["samples"] if compared else ())):
        for sample in samples:
            if sample["itl_ms"]:
                kept.setdefault(sample["workload"], []).append(sample)
    names = list(found)[:_MOST]
    lines = [_Line(name, colour, False, found[name]) for colour, name in enumerate(names)]
    return [*lines, *(_Line(name, colour, True, other[name]) for colour, name in enumerate(names) if name in other)]


def _latency(report: Report) -> list[str]:
    import numpy as np

    groups = [(line, np.sort([ms for s in line.samples for ms in s["itl_ms"]])) for line in _written(report)]
    if not groups:
        return []
    low = max(min(float(np.percentile(times, 0.5)) for _, times in groups), 1e-3)
    high = max(*(float(np.percentile(times, 99.5)) for _, times in groups), low * 1.05)
    plot = Plot(
        "Share of tokens over the time between tokens",
        Axis("time between tokens, ms", low * 0.98, high * 1.02, log=high / low > _WIDE),
        Axis("share of tokens", 0, 1, names=[(0, "0"), (0.25, "25 %"), (0.5, "50 %"), (0.75, "75 %"), (1, "100 %")]),
    )
    plot.rule(0.95, "p95")
    styles = _styles(report)
    for line, times in groups:
        shares = np.linspace(0, 1, min(len(times), 200))
        points = [(float(np.quantile(times, share)), float(share)) for share in shares]
        plot.line(points, line.colour, line.tip(styles), dashed=line.baseline)
    what = "How many of the tokens came within that time after the one before. Steep is steady; a long tail at the top is jitter."
    return [
        _figure("Latency distribution", what, plot.svg(), [one.name for one, _ in groups if not one.baseline], styles)
    ]


def _position(report: Report) -> list[str]:
    import numpy as np

    depths = {entry["name"]: entry["depth"] for entry in report["workloads"]}
    styles = _styles(report)

    def spread(values: Sequence[float]) -> tuple[float, float, float]:
        low, middle, high = (float(v) for v in np.percentile(values, (10, 50, 90)))
        return low, middle, high

    series = []
    for line in _written(report):
        points = [
            ((sample["prompt_tokens"] or 0) + depths[line.name] + n, rate)
            for sample in line.samples
            for n, rate in _rates_at(sample)
        ]
        if points:
            series.append((line, binned(points, min(32, max(4, len(points) // 8)), spread)))
    if not series or report["target"]["kind"] == "http":
        return []
    xs = [x for _, places in series for x, *_ in places]
    plot = Plot(
        "Tokens per second over the position in the context",
        Axis("position in the context, tokens", *span(xs, margin=0.02)),
        Axis("tokens/s of a row", *span([high for _, places in series for *_, high in places], zero=True)),
    )
    for line, places in series:
        if not line.baseline:
            plot.band([(x, low, high) for x, low, _, high in places], line.colour)
        plot.line([(x, middle) for x, _, middle, _ in places], line.colour, line.tip(styles), dashed=line.baseline)
    what = "The median of what each token's time comes to, with the 10th to 90th percentile. It falls as attention has more to look at."
    return [
        _figure("Speed over position", what, plot.svg(), [one.name for one, _ in series if not one.baseline], styles)
    ]


def _rates_at(sample: dict[str, Any]) -> list[tuple[int, float]]:
    """Tokens/s at each token of an answer; those that were guessed ahead and came together share the time of their step."""
    times = sample["itl_ms"]
    at_once = _AT_ONCE * sum(times) / len(times) if sample.get("accepted_tokens") else 0.0
    steps: list[list[float]] = []
    for ms in times:
        if steps and ms < at_once:
            steps[-1].append(ms)
        else:
            steps.append([ms])
    rates = [1e3 * len(step) / sum(step) if sum(step) else 0.0 for step in steps for _ in step]
    return [(n, rate) for n, rate in enumerate(rates, 1) if rate]


def _memory(report: Report) -> list[str]:
    drawn = {entry["name"] for entry in report["workloads"] if entry["kind"] == "drawn"}
    styles = _styles(report)
    curves = _curves(report, drawn)
    others = _curves(report["comparison"]["report"], drawn) if styles else {}
    found = []
    for of, curve in curves.items():
        lines = [curve["points"], *([others[of]["points"]] if of in others else [])]
        plot = Plot(
            "Resident memory over time",
            Axis("seconds since the measurement began", 0, max(x for points in lines for x, _ in points) or 1),
            Axis("resident, MB", *span([y for points in lines for _, y in points], zero=True, margin=0.12)),
        )
        plot.band([(x, 0, y) for x, y in lines[0]], 0)
        for points, dashed in zip(lines, (False, True), strict=False):
            plot.line([(x, y) for x, y in points], 0, styles[dashed] if styles else "resident memory", dashed=dashed)
        for x, name in curve["marks"]:
            plot.rule(x, name, upright=True)
        whose = "service" if report["target"]["kind"] == "http" else "measuring process"
        most = ", ".join(f"{max(y for _, y in points):,.0f}" for points in lines)
        what = f"The {whose}, ten times a second; highest {most} MB."
        title = f"Memory over time: {of}" if len(curves) > 1 else "Memory over time"
        found.append(_figure(title, what, plot.svg(), (), styles if len(lines) > 1 else ()))
    return found


def _curves(report: Report, drawn: set[str]) -> dict[str, Report]:
    """The memory of a report's processes, by what they did."""
    found = {}
    for curve in report["memory"] or ():
        if len(curve["points"]) > 1:
            found["drawn prompts" if any(name in drawn for _, name in curve["marks"]) else "conversations"] = curve
    return found


def _apart(report: Report) -> list[str]:
    names = ("tokenization", "prefill", "sampling", "decoding", "making text")
    rows = []
    for entry in report["workloads"]:
        if parts := _parts(entry):
            rows.append((entry["name"], parts))
    if not rows:
        return []
    plot = Plot(
        "Where the time of a request goes",
        Axis("ms", 0, max(sum(parts) for _, parts in rows) * 1.02),
        Axis("", 0.4, len(rows) + 0.6, names=[(len(rows) - n, name) for n, (name, _) in enumerate(rows)]),
        height=84 + 34 * len(rows),
        left=124,
    )
    for n, (_, parts) in enumerate(rows):
        start = 0.0
        for colour, (name, ms) in enumerate(zip(names, parts, strict=True)):
            plot.bar(start, start + ms, len(rows) - n, 20, colour, f"{name}: {ms:,.2f} ms")
            start += ms
    return [
        _figure(
            "Where a request's time goes",
            "Medians of the parts; decoding is what is left of the whole.",
            plot.svg(),
            names,
        )
    ]


def _parts(entry: Report) -> list[float]:
    """Milliseconds of each part of a request of a workload, nothing where they are not known."""
    if not entry["e2e_ms"] or not entry["sampling_ms"] or not entry["prefill_ms"]:
        return []
    names = ("tokenization_ms", "prefill_ms", "sampling_ms", "detokenization_ms", "e2e_ms")
    begun, read, sampled, text, whole = (float(entry[name]["p50"]) for name in names)
    if entry["kind"] == "drawn":  # a session's first token has more to it than sampling, so that counts once
        sampled *= entry["new_tokens"]
    return [begun, read, sampled, max(whole - begun - read - sampled - text, 0.0), text]


def _rates_over(
    groups: Sequence[_Line],
    key: str,
    label: str,
    title: str,
    what: str,
    keys: dict[str, str],
    styles: Sequence[str] = (),
) -> list[str]:
    """Rates over a count (threads, clients): a plot for each of `keys`, a line for each group."""
    found = []
    for field, name in keys.items():
        lines = [
            (group, [(float(row[key]), _middle(row[field])) for row in group.samples if row[field]]) for group in groups
        ]
        lines = [(group, points) for group, points in lines if len(points) > 1]
        if not lines:
            continue
        places = [point for _, points in lines for point in points]
        counts = sorted({x for x, _ in places})
        plot = Plot(
            f"{name} over {label}",
            Axis(label, *span(counts, margin=0.08), names=[(count, number(count)) for count in counts]),
            Axis(name, *span([y for _, y in places], zero=True, margin=0.15)),
        )
        for group, points in lines:
            plot.line(points, group.colour, group.tip(styles), dashed=group.baseline)
            for count, value in points:
                plot.dot(count, value, group.colour, f"{group.tip(styles)}, {number(count)}: {value:,.1f}")
                ends = {counts[0]: "start", counts[-1]: "end"}
                if len(lines) == 1:
                    plot.word(count, value, f"{value:,.1f}", anchor=ends.get(count, "middle"))
        names = [group.name for group, _ in lines if not group.baseline]
        found.append(_figure(f"{title}: {name}", what, plot.svg(), names, styles))
    return found


def _middle(value: Any) -> float:
    return float(value["p50"] if isinstance(value, dict) else value)


def _scaling(report: Report) -> list[str]:
    if not report["scaling"]:
        return []
    keys = {"decode_tokens_per_s": "decode tokens/s", "prefill_tokens_per_s": "prefill tokens/s"}
    group = _Line("this artifact", 0, False, report["scaling"])
    return _rates_over([group], "threads", "threads", "Threads", "Medians, measured in turn.", keys)


def _clients(report: Report) -> list[str]:
    styles, groups = _styles(report), []
    known: dict[str, int] = {}
    for baseline in (False, True)[: 1 + bool(styles)]:
        works: dict[str, list[dict[str, Any]]] = {}
        for entry in (report["comparison"]["report"] if baseline else report)["workloads"]:
            if entry["concurrency"]:
                works.setdefault(entry["name"].rpartition(", ")[0], []).append(entry)
        groups += [_Line(name, known.setdefault(name, len(known)), baseline, rows) for name, rows in works.items()]
    keys = {"total_tokens_per_s": "tokens/s of all", "ttft_ms": "first token, ms"}
    what = "What the service gives to so many at once."
    return _rates_over(groups, "concurrency", "clients at once", "Clients", what, keys, styles)


def _ratios(report: Report) -> list[str]:
    found = (report["comparison"] or {}).get("ratios")
    if not found:
        return []
    ends = [value for one in found for value in (one["low"], one["high"], one["value"]) if value] + [1.0]
    names = [f"{one['workload']} {one['what']}" for one in found]
    plot = Plot(
        "Ratio of the speeds",
        Axis(f"times as fast as {report['comparison']['baseline']}", *span(ends, margin=0.15)),
        Axis("", 0.4, len(found) + 0.6, names=[(len(found) - n, name) for n, name in enumerate(names)]),
        height=84 + 30 * len(found),
        left=min(max(120, 12 + 7 * max(map(len, names))), 220),
    )
    plot.rule(1.0, upright=True)
    for n, one in enumerate(found):
        y, colour = len(found) - n, _side(one)
        if one["low"]:
            plot.line([(one["low"], y), (one["high"], y)], colour)
        plot.dot(one["value"], y, colour, f"{names[n]}: {one['value']:.3f}")
        plot.word(one["value"], y, f"{one['value']:.2f}")
    what = "Points are ratios, lines their 95 % intervals; right of 1 is faster, grey is no sure difference."
    return [_figure("Comparison", what, plot.svg())]


def _side(found: Report) -> int:
    """The colour of faster, slower, and neither."""
    if found["low"] and found["low"] <= 1 <= found["high"]:
        return 5
    return 0 if found["value"] >= 1 else 1


def _front(report: Report) -> list[str]:
    """Quality against speed against size."""
    points = [point for point in _quality(report) if point["decode_tokens_per_s"] and point["kld_mean"] is not None]
    if not points:
        return []
    worst = [max(point["kld_mean"], 1e-5) for point in points]
    plot = Plot(
        "Divergence against speed, circles as large as the artifacts",
        Axis("decode tokens/s", *span([point["decode_tokens_per_s"] for point in points], margin=0.25)),
        Axis("KL to the merged model, nats", min(worst) / 3, max(worst) * 3, log=True),
    )
    largest = max(point["size_mb"] for point in points)
    for point, kld in zip(points, worst, strict=True):
        radius = 4 + 12 * (point["size_mb"] / largest) ** 0.5
        tip = f"{point['name']}: {point['decode_tokens_per_s']:,.1f} tokens/s, KL {kld:.4f}, {point['size_mb']:,.0f} MB"
        plot.dot(point["decode_tokens_per_s"], kld, point["colour"], tip, radius)
        right = plot.x.share(point["decode_tokens_per_s"]) > 0.6
        label = f"{point['name']}, {point['size_mb']:,.0f} MB"
        place = (-radius - 3 if right else radius + 3, 4)
        plot.word(point["decode_tokens_per_s"], kld, label, place, "end" if right else "start")
    what = (
        "Right is faster, low is closer to the merged model, small circles are small files. Grey: other runs beside it, "
        "as their own reports have them."
    )
    return [_figure("Quality, speed, size", what, plot.svg())]


def _quality(report: Report) -> list[Report]:
    """What is known of quality, speed and size: of this artifact, of runs beside it, and of the baseline."""
    found = [{**point, "colour": 0 if point["this"] else 5} for point in report["siblings"] or ()]
    compared = report["comparison"]
    for name, one, colour in (
        ((compared["name"], report, 0), (compared["baseline"], compared["report"], 1)) if compared else ()
    ):
        rate, known = one["decode_tokens_per_s"], one.get("quality")
        if not known or not rate or not one["size_mb"]:
            continue
        point = {"name": name, "decode_tokens_per_s": rate["p50"], "size_mb": one["size_mb"], "colour": colour, **known}
        found = [other for other in found if not (colour == 0 and other["colour"] == 0)]
        found.append(point)
    return found


_FIGURES = (_ratios, _latency, _position, _apart, _memory, _scaling, _clients, _front)
