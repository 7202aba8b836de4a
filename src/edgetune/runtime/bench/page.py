"""A report as one HTML page that needs nothing else: plots, tables, light and dark, wide and narrow."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from edgetune.runtime.bench.figures import figures
from edgetune.runtime.bench.text import METRIC_HEAD, measured_with, metrics, table

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
.dashed{stroke-dasharray:6 4}.legend .dashed{background:repeating-linear-gradient(90deg,var(--soft) 0 4px,transparent 4px 7px);height:2px;
vertical-align:4px;width:22px;border-radius:0}.legend .solid{background:var(--soft);height:2px;vertical-align:4px;width:22px;border-radius:0}
.c0{--k:var(--c0)}.c1{--k:var(--c1)}.c2{--k:var(--c2)}.c3{--k:var(--c3)}.c4{--k:var(--c4)}.c5{--k:var(--c5)}
table{border-collapse:collapse;width:100%;font-size:.9rem}td{border-top:1px solid var(--line);padding:5px 10px 5px 0;
vertical-align:top;overflow-wrap:anywhere}.rows td:first-child{white-space:nowrap;color:var(--soft);padding-right:18px}
.wide{overflow-x:auto}.wide td,.wide th{white-space:nowrap;padding:4px 14px 4px 0;text-align:right;font-variant-numeric:tabular-nums;font-size:.85rem}
.wide th{font-weight:500;color:var(--soft)}.wide td:nth-child(-n+2),.wide th:nth-child(-n+2){text-align:left}
@media(max-width:560px){.rows td{display:block;border:0;padding:0}.rows td:first-child{border-top:1px solid var(--line);padding-top:6px;
font-size:.8rem}.rows td:last-child{padding-bottom:6px}}
"""


def as_html(report: dict[str, Any]) -> str:
    """The report as a page."""
    title = f"Benchmark of {report['artifact']}"
    rows = table(report)
    said = [(what, value) for what, value in rows if what in ("warning", "verdict", "fault", "note")]
    notes = _said([value for what, value in said if what == "verdict"], "warn say")
    notes += _said([value for what, value in said if what != "verdict"], "warn")
    kept = [row for row in rows if row not in said]
    files = list((report["files"] or {}).items())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{_STYLE}</style><main><h1>{escape(title)}</h1>"
        f'<p class="soft">{escape(kept[1][1])}</p><div class="tiles">{"".join(_tiles(report))}</div>{notes}'
        f'<div class="plots">{"".join(figures(report))}</div><h2>Numbers</h2>{_table(kept)}{_metrics(report)}'
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
    return f'<table class="rows">{cells}</table>'


def _metrics(report: dict[str, Any]) -> str:
    """Each metric with all that is known of it, of both where two are compared."""
    compared = report["comparison"]
    of = (
        [(f": {compared['name']}", report), (f": {compared['baseline']}", compared["report"])]
        if compared
        else [("", report)]
    )
    return "".join(f"<h2>Each metric{escape(name)}</h2>{_wide(metrics(each))}" for name, each in of)


def _wide(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in METRIC_HEAD)
    lines, before = [], ""
    for name, *cells in rows:
        shown = [name if name != before else "", *cells]
        lines.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in shown) + "</tr>")
        before = name
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>'
