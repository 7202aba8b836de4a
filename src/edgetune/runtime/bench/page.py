"""A report as one HTML page that needs nothing else: plots, tables, light and dark, wide and narrow."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from edgetune.runtime.bench.plots import Axis, Plot, binned, legend, number, span
from edgetune.runtime.bench.text import measured_with, table

_WIDE = 8  # times from which on are drawn on a logarithmic axis
_STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1f24;--soft:#5b6570;--line:#e3e7eb;--card:#f7f8fa;
--c0:#0b69b5;--c1:#c4510b;--c2:#08805f;--c3:#9a4fae;--c4:#8a6d00;--c5:#50606e}
@media(prefers-color-scheme:dark){:root{--bg:#14171a;--fg:#e6e9ec;--soft:#9aa5b0;--line:#2c3238;--card:#1c2025;
--c0:#5aaef0;--c1:#f3914f;--c2:#4cc9a0;--c3:#cd92dd;--c4:#d9b93b;--c5:#a9b6c2}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,sans-serif}
main{max-width:1020px;margin:0 auto;padding:24px 16px 48px}h1{font-size:1.5rem;margin:0;overflow-wrap:anywhere}
h2{font-size:1.05rem;margin:32px 0 8px}h3{font-size:.95rem;margin:0 0 4px}p{margin:4px 0}.soft{color:var(--soft)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:10px;margin:18px 0}
.tile,figure,.warn{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px;margin:0}
.tile b{display:block;font-size:1.35rem;font-weight:600;font-variant-numeric:tabular-nums}.tile span{color:var(--soft);font-size:.85rem}
.warn{border-left:4px solid var(--c1);margin:10px 0}.say{border-left-color:var(--c2)}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:14px}
figure p{font-size:.85rem;color:var(--soft);margin:0 0 6px}svg{display:block;width:100%;height:auto}
svg text{fill:var(--soft);font:13px system-ui,sans-serif}svg .note{font-size:12px;fill:var(--fg)}
.grid{stroke:var(--line)}.rule{stroke:var(--soft);stroke-dasharray:3 3}
.line{fill:none;stroke-width:1.8;stroke:var(--k)}.band{fill:var(--k);opacity:.18}.dot,.bar{fill:var(--k)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 14px;margin:6px 0 0;padding:0;font-size:.82rem}
.legend i{display:inline-block;width:12px;height:12px;border-radius:3px;background:var(--k);margin-right:5px;vertical-align:-1px}
.c0{--k:var(--c0)}.c1{--k:var(--c1)}.c2{--k:var(--c2)}.c3{--k:var(--c3)}.c4{--k:var(--c4)}.c5{--k:var(--c5)}
table{border-collapse:collapse;width:100%;font-size:.9rem}td{border-top:1px solid var(--line);padding:5px 10px 5px 0;
vertical-align:top;overflow-wrap:anywhere}td:first-child{white-space:nowrap;color:var(--soft);padding-right:18px}
@media(max-width:560px){td{display:block;border:0;padding:0}td:first-child{border-top:1px solid var(--line);padding-top:6px;
font-size:.8rem}td:last-child{padding-bottom:6px}}
"""


def as_html(report: dict[str, Any]) -> str:
    """The report as a page."""
    title = f"Benchmark of {report['artifact']}"
    rows = table(report)
    said = [(what, value) for what, value in rows if what in ("warning", "verdict", "note")]
    notes = _said([value for what, value in said if what == "verdict"], "warn say")
    notes += _said([value for what, value in said if what != "verdict"], "warn")
    drawn = [plot for draw in _PLOTS for plot in draw(report)]
    kept = [row for row in rows if row not in said]
    files = list((report["files"] or {}).items())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{_STYLE}</style><main><h1>{escape(title)}</h1>"
        f'<p class="soft">{escape(kept[1][1])}</p><div class="tiles">{"".join(_tiles(report))}</div>{notes}'
        f'<div class="plots">{"".join(drawn)}</div><h2>Numbers</h2>{_table(kept)}'
        f"<h2>Measured with</h2>{_table(measured_with(report))}"
        + (f"<h2>Files (SHA-256)</h2>{_table(files)}" if files else "")
        + "</main></html>\n"
    )


def _said(texts: Sequence[str], kind: str) -> str:
    lines = "".join(f"<p>{escape(text)}</p>" for text in texts)
    return f'<div class="{kind}">{lines}</div>' if texts else ""


def _tiles(report: dict[str, Any]) -> list[str]:
    shown = []
    for name, what in (("decode_tokens_per_s", "tokens/s decode"), ("prefill_tokens_per_s", "tokens/s prefill")):
        if report[name]:
            shown.append((f"{report[name]['p50']:,.0f}", what))
    if report["ttft_ms"]:
        shown.append((f"{report['ttft_ms']['p50']:,.0f} ms", "to the first token (p50)"))
    if report["itl_ms"]:
        shown.append((f"{report['itl_ms']['p99']:,.1f} ms", "between tokens (p99)"))
    if report["peak_rss_mb"]:
        shown.append((f"{report['peak_rss_mb']:,.0f} MB", "peak memory"))
    if report["size_mb"]:
        shown.append((f"{report['size_mb']:,.0f} MB", "on disk"))
    return [f'<div class="tile"><b>{escape(value)}</b><span>{what}</span></div>' for value, what in shown]


def _table(rows: Sequence[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><td>{escape(what)}</td><td>{escape(value)}</td></tr>" for what, value in rows)
    return f"<table>{cells}</table>"


def _figure(title: str, what: str, picture: str, names: Sequence[str] = ()) -> str:
    return f"<figure><h3>{escape(title)}</h3><p>{escape(what)}</p>{picture}{legend(names) if len(names) > 1 else ''}</figure>"


def _by_workload(report: dict[str, Any], most: int = 6) -> list[tuple[str, list[dict[str, Any]]]]:
    """Names of workloads that write tokens, with their samples."""
    found: dict[str, list[dict[str, Any]]] = {}
    for sample in report["samples"]:
        if sample["itl_ms"]:
            found.setdefault(sample["workload"], []).append(sample)
    return list(found.items())[:most]


def _latency(report: dict[str, Any]) -> list[str]:
    import numpy as np

    groups = [(name, np.sort([ms for s in samples for ms in s["itl_ms"]])) for name, samples in _by_workload(report)]
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
    for index, (name, times) in enumerate(groups):
        shares = np.linspace(0, 1, min(len(times), 200))
        plot.line([(float(np.quantile(times, share)), float(share)) for share in shares], index, name)
    what = "How many of the tokens came within that time after the one before. Steep is steady; a long tail at the top is jitter."
    return [_figure("Latency distribution", what, plot.svg(), [name for name, _ in groups])]


def _position(report: dict[str, Any]) -> list[str]:
    import numpy as np

    depths = {entry["name"]: entry["depth"] for entry in report["workloads"]}

    def spread(values: Sequence[float]) -> tuple[float, float, float]:
        low, middle, high = (float(v) for v in np.percentile(values, (10, 50, 90)))
        return low, middle, high

    series = []
    for name, samples in _by_workload(report):
        points = [
            ((s["prompt_tokens"] or 0) + depths[name] + n, 1e3 / ms)
            for s in samples
            for n, ms in enumerate(s["itl_ms"], 1)
            if ms > 0
        ]
        if points:
            series.append((name, binned(points, min(32, max(4, len(points) // 8)), spread)))
    if not series or report["target"]["kind"] == "http":
        return []
    xs = [x for _, line in series for x, *_ in line]
    plot = Plot(
        "Tokens per second over the position in the context",
        Axis("position in the context, tokens", *span(xs, margin=0.02)),
        Axis("tokens/s of a row", *span([high for _, line in series for *_, high in line], zero=True)),
    )
    for index, (name, line) in enumerate(series):
        plot.band([(x, low, high) for x, low, _, high in line], index)
        plot.line([(x, middle) for x, _, middle, _ in line], index, name)
    what = "The median of what each token's time comes to, with the 10th to 90th percentile. It falls as attention has more to look at."
    return [_figure("Speed over position", what, plot.svg(), [name for name, _ in series])]


def _memory(report: dict[str, Any]) -> list[str]:
    curves = [curve for curve in report["memory"] or () if len(curve["points"]) > 1]
    drawn = {entry["name"] for entry in report["workloads"] if entry["kind"] == "drawn"}
    found = []
    for curve in curves:
        of = ""
        if len(curves) > 1:
            of = ": drawn prompts" if any(name in drawn for _, name in curve["marks"]) else ": conversations"
        points = [(x, y) for x, y in curve["points"]]
        plot = Plot(
            "Resident memory over time",
            Axis("seconds since the measurement began", 0, max(x for x, _ in points) or 1),
            Axis("resident, MB", *span([y for _, y in points], zero=True, margin=0.12)),
        )
        plot.band([(x, 0, y) for x, y in points], 0)
        plot.line(points, 0, "resident memory")
        for x, name in curve["marks"]:
            plot.rule(x, name, upright=True)
        whose = "service" if report["target"]["kind"] == "http" else "measuring process"
        what = f"The {whose}, ten times a second; highest {max(y for _, y in points):,.0f} MB."
        found.append(_figure(f"Memory over time{of}", what, plot.svg()))
    return found


def _apart(report: dict[str, Any]) -> list[str]:
    names = ("tokenization", "prefill", "sampling", "decoding", "making text")
    rows = []
    for entry in report["workloads"]:
        if entry["e2e_ms"] and entry["decode_ms"] and entry["sampling_ms"]:
            written = entry["new_tokens"]
            times = [entry["tokenization_ms"], entry["prefill_ms"], entry["sampling_ms"], entry["decode_ms"]]
            found = [time["p50"] for time in times]
            found = [*found[:2], found[2] * written, found[3] * (written - 1)]
            rows.append((entry["name"], [*found, entry["detokenization_ms"]["p50"]]))
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
    return [_figure("Where a request's time goes", "Medians of the parts, one after the other.", plot.svg(), names)]


def _rates_over(
    rows: Sequence[dict[str, Any]], key: str, label: str, title: str, what: str, keys: dict[str, str]
) -> list[str]:
    """Rates over a count (threads, clients)."""
    counts = [float(row[key]) for row in rows]
    shown = [(name, field) for field, name in keys.items() if all(row[field] for row in rows)]
    found = []
    for colour, (name, field) in enumerate(shown):
        points = [(row[field]["p50"] if isinstance(row[field], dict) else row[field]) for row in rows]
        plot = Plot(
            f"{name} over {label}",
            Axis(label, *span(counts, margin=0.08), names=[(count, number(count)) for count in counts]),
            Axis(name, *span(points, zero=True, margin=0.15)),
        )
        plot.line(list(zip(counts, points, strict=True)), colour, name)
        for count, value in zip(counts, points, strict=True):
            plot.dot(count, value, colour, f"{number(count)}: {value:,.1f}")
            ends = {counts[0]: "start", counts[-1]: "end"}
            plot.word(count, value, f"{value:,.1f}", anchor=ends.get(count, "middle"))
        found.append(_figure(f"{title}: {name}", what, plot.svg()))
    return found


def _scaling(report: dict[str, Any]) -> list[str]:
    if not report["scaling"]:
        return []
    keys = {"decode_tokens_per_s": "decode tokens/s", "prefill_tokens_per_s": "prefill tokens/s"}
    return _rates_over(report["scaling"], "threads", "threads", "Threads", "Medians, measured in turn.", keys)


def _clients(report: dict[str, Any]) -> list[str]:
    rows = [entry for entry in report["workloads"] if entry["concurrency"]]
    if len(rows) < 2:
        return []
    keys = {"total_tokens_per_s": "tokens/s of all", "ttft_ms": "first token, ms"}
    return _rates_over(
        rows, "concurrency", "clients at once", "Clients", "What the service gives to so many at once.", keys
    )


def _ratios(report: dict[str, Any]) -> list[str]:
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
        left=150,
    )
    plot.rule(1.0, upright=True)
    for n, one in enumerate(found):
        y, colour = len(found) - n, 0 if one["value"] >= 1 else 1
        if one["low"]:
            plot.line([(one["low"], y), (one["high"], y)], colour)
        plot.dot(one["value"], y, colour, f"{names[n]}: {one['value']:.3f}")
        plot.word(one["value"], y, f"{one['value']:.2f}")
    what = "Points are ratios, lines their 95 % intervals; right of 1 is faster."
    return [_figure("Comparison", what, plot.svg())]


def _front(report: dict[str, Any]) -> list[str]:
    """Quality against speed against size."""
    points = [
        point for point in report["siblings"] or () if point["decode_tokens_per_s"] and point["kld_mean"] is not None
    ]
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
        plot.dot(point["decode_tokens_per_s"], kld, 0 if point["this"] else 5, tip, radius)
        right = plot.x.share(point["decode_tokens_per_s"]) > 0.6
        label = f"{point['name']}, {point['size_mb']:,.0f} MB"
        place = (-radius - 3 if right else radius + 3, 4)
        plot.word(point["decode_tokens_per_s"], kld, label, place, "end" if right else "start")
    what = "Right is faster, low is closer to the merged model, small circles are small files. Grey: other runs beside it, as their own reports have them."
    return [_figure("Quality, speed, size", what, plot.svg())]


_PLOTS = (_ratios, _latency, _position, _apart, _memory, _scaling, _clients, _front)
