"""Artifacts beside one another: size, quality and speed of each, from reports or measured now, as a table and a plot.

A row is Pareto-optimal when no other is at least as good in size, mean KL divergence and decode rate, and better in one.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.errors import EdgetuneError, InputError, need
from edgetune.export.graph_reader import CONFIG
from edgetune.export.readers import ends, is_graph, model_at
from edgetune.files import digest, folder_size, read_json, write_json
from edgetune.progress import say
from edgetune.recipe import BenchSection
from edgetune.run import FORMAT as SEALED
from edgetune.run import MANIFEST, NOT_CONTENT, outputs, read_manifest
from edgetune.standalone_verify import verify_artifact

FORMAT = "edgetune/compare/1"
# The measures of a row: whether less is better. The first three decide what is Pareto-optimal.
BETTER_LESS = {
    "size_mb": True,
    "kld_mean": True,
    "decode_tokens_per_s": False,
    "kld_p99": True,
    "top1_agreement": False,
    "perplexity_ratio": True,
    "prefill_tokens_per_s": False,
    "peak_rss_mb": True,
}
_DECIDE = tuple(BETTER_LESS)[:3]
_MARKERS = "osD^v"  # ten colours each
_FLOOR = 1e-5  # nats: lower ones are drawn here, as the axis is logarithmic


@dataclass(frozen=True)
class Measure:
    """How everything is measured anew: against what model, on which rows (see `verify_artifact`), and the benchmark."""

    against: Path
    data: Path
    rows: int | None = None
    step: int | None = None
    bench: BenchSection | None = None


def compare(paths: Sequence[Path], measure: Measure | None = None, out: Path | None = None) -> dict[str, Any]:
    """Put models beside one another.

    Args:
        paths: artifacts and runs, folders of other tools included; with `measure` whatever `verify_artifact` takes.
        measure: measure each now; None takes the reports of the runs that they lie in.
        out: folder that gets compare.json and compare.png.

    Returns:
        `rows`, one a path in their order: `name`, `path`, the measures of `BETTER_LESS` (None where unknown),
        `pareto` (None where a deciding measure is unknown), `error`; and `notes`: what makes numbers incomparable.

    Raises:
        InputError: a path is no model.
    """
    if out is not None:
        need("matplotlib")
        if out.exists() and not out.is_dir():
            raise InputError("is not a folder", where=out, fix="choose another folder: --out FOLDER")
    found = [model_at(path, "artifact") for path in paths]
    rows = [{"name": name, "path": str(path)} for name, path in zip(_names(paths, found), found, strict=True)]
    known = [
        _measured(row, path, measure) if measure else _reported(path) for row, path in zip(rows, found, strict=True)
    ]
    for row, numbers in zip(rows, known, strict=True):
        row |= dict.fromkeys(BETTER_LESS) | {"error": None} | numbers["row"]
    _mark(rows)
    result = {"format": FORMAT, "rows": rows, "notes": _notes(rows, known)}
    if out is not None:
        write_json(out / "compare.json", result)
        plot(rows, out / "compare.png")
    return result


def _names(paths: Sequence[Path], found: Sequence[Path]) -> list[str]:
    """Short names that differ: a run's for its artifact, else the folder's, with as much of the path as it takes."""
    plain = [folder.parent if folder.name == "artifact" else folder for folder in found]
    plain = [p if p.suffix == ".gguf" else f for p, f in zip(paths, plain, strict=True)]
    names = [folder.name for folder in plain]
    return [n if names.count(n) == 1 else f"{f.parent.name}/{n}" for n, f in zip(names, plain, strict=True)]


def _reported(artifact: Path) -> dict[str, Any]:
    """What the run around an artifact says of it; nothing of what was measured on another."""
    entries = read_manifest(artifact).get("outputs", {})
    content = digest({name: entry["sha256"] for name, entry in entries.items() if name not in NOT_CONTENT})
    reports: dict[str, Any] = {}
    for stage in ("verify", "bench"):
        folder = artifact.parent / stage
        inputs = read_manifest(folder).get("inputs", {})
        if entries and inputs.get("artifact") == content:
            reports[stage] = {**read_json(folder / "report.json"), "inputs": inputs}
    return _numbers(artifact, reports.get("verify"), reports.get("bench"))


def _measured(row: dict[str, Any], artifact: Path, measure: Measure) -> dict[str, Any]:
    """Verify and bench it now. What fails is told in the row, so that the others are not lost."""
    from edgetune.runtime.bench.measure import bench

    say(f"{row['name']}:")
    verified = benched = error = None
    try:
        verified = verify_artifact(artifact, measure.against, measure.data, measure.rows, {}, None, step=measure.step)
        if is_graph(artifact):
            section = measure.bench or BenchSection()
            if read_manifest(artifact):
                benched = bench(artifact, section)
            else:
                with tempfile.TemporaryDirectory(prefix=".edgetune-", dir=artifact.parent) as folder:
                    benched = bench(_adopted(artifact, Path(folder) / artifact.name), section)
    except EdgetuneError as failed:
        error = failed.text()
        say(f"{row['name']}: {failed.text()}")
    numbers = _numbers(artifact, verified, benched)
    numbers["row"]["error"] = error
    return numbers


def _adopted(folder: Path, to: Path) -> Path:
    """An artifact of another tool's as the benchmark takes it: the same files, linked, and a manifest."""
    to.mkdir()
    for file in folder.iterdir():
        if file.is_file() and file.name != MANIFEST:
            try:
                os.link(file.resolve(), to / file.name)
            except OSError:  # a file system without links
                shutil.copy2(file, to / file.name)
    config = read_json(to / CONFIG)
    config.setdefault("search", {}).setdefault("max_length", config["model"]["context_length"])
    write_json(to / CONFIG, config)
    nothing = {"messages": [], "text": "", "ids": []}  # the benchmark sends prompts of its own
    golden = {"format": "edgetune/golden/1", "stop_ids": ends(to), "prompts": [nothing]}
    write_json(to / "golden.json", golden)
    write_json(to / MANIFEST, {"format": SEALED, "stage": "export", "name": folder.name, "outputs": outputs(to)})
    return to


def _numbers(artifact: Path, verified: dict[str, Any] | None, benched: dict[str, Any] | None) -> dict[str, Any]:
    """A row's measures, and what they were measured with."""
    row: dict[str, Any] = {"size_mb": round(folder_size(artifact) / 1e6, 2)}
    on: dict[str, Any] = {}
    if verified:
        row |= {name: verified[name] for name in ("kld_mean", "kld_p99", "top1_agreement")}
        row["perplexity_ratio"] = verified["perplexity"]["ratio"]
        inputs = verified.get("inputs", {})
        on["verify"] = {
            "model": inputs.get("merged", verified.get("against")),
            "rows": [inputs.get("data"), verified["rows"], verified["tokens"]],
            "tokens fed at once": verified.get("step"),
            "provider": (verified.get("device") or {}).get("provider", "cpu"),
        }
    if benched:
        row |= {name: benched[name]["p50"] for name in ("decode_tokens_per_s", "prefill_tokens_per_s")}
        row["peak_rss_mb"] = benched["peak_rss_mb"]
        on["bench"] = {
            "processor": benched["hardware"]["cpu"]["model"],
            "threads": benched["threads"],
            "lengths": [benched["prompt_tokens"], benched["new_tokens"]],
        }
    return {"row": row, "on": on}


def _notes(rows: Sequence[dict[str, Any]], known: Sequence[dict[str, Any]]) -> list[str]:
    """What was measured differently, so that it does not compare, and what is not known."""
    notes = []
    for stage, what in (("verify", "KL divergence"), ("bench", "speed")):
        on = [numbers["on"][stage] for numbers in known if stage in numbers["on"]]
        notes += [
            f"{what} does not compare: the {name} differ{'s' * (name in ('model', 'processor'))}"
            for name in (on[0] if on else ())
            if any(other[name] != on[0][name] for other in on)
        ]
        missing = [row["name"] for row, numbers in zip(rows, known, strict=True) if stage not in numbers["on"]]
        if missing:
            notes.append(f"no {what} is known of {', '.join(missing)}")
    return notes


def _mark(rows: list[dict[str, Any]]) -> None:
    """Set `pareto`: whether no other row is better in what decides, as far as it is known of any row."""
    names = [name for name in _DECIDE if any(row[name] is not None for row in rows)]
    cost = [
        None
        if any(row[name] is None for name in names)
        else tuple(row[name] if BETTER_LESS[name] else -row[name] for name in names)
        for row in rows
    ]
    for row, mine in zip(rows, cost, strict=True):
        row["pareto"] = None if mine is None else not any(_beats(other, mine) for other in cost if other is not None)


def _beats(one: Sequence[float], other: Sequence[float]) -> bool:
    return tuple(one) != tuple(other) and all(a <= b for a, b in zip(one, other, strict=True))


def table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows for people; `*` marks what is Pareto-optimal."""
    columns = ["", "artifact", "size", "KL mean", "KL p99", "best token agrees", "perplexity ratio"]
    columns += ["decode", "prefill", "peak memory"]
    forms = {
        "size_mb": "{:,.1f} MB",
        "kld_mean": "{:.4f}",
        "kld_p99": "{:.4f}",
        "top1_agreement": "{:.1%}",
        "perplexity_ratio": "{:.4f}",
        "decode_tokens_per_s": "{:,.1f}/s",
        "prefill_tokens_per_s": "{:,.0f}/s",
        "peak_rss_mb": "{:,.0f} MB",
    }
    rows = [
        [
            "*" if row["pareto"] else "",
            row["name"],
            *("-" if row[name] is None else form.format(row[name]) for name, form in forms.items()),
        ]
        for row in result["rows"]
    ]
    return columns, rows


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw mean KL divergence over size, and over the decode rate, as a PNG; filled is Pareto-optimal.

    Names stand in the legend: artifacts of one size and quality lie on one another.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    shown = {}
    for axes, name, label in (
        (left, "size_mb", "size (MB), left is better"),
        (right, "decode_tokens_per_s", "decode (tokens/s), right is better"),
    ):
        drawn = [row for row in rows if row[name] is not None and row["kld_mean"] is not None]
        for row in drawn:
            number = next(n for n, other in enumerate(rows) if other is row)
            color = f"C{number % 10}"
            style = {"color": color, "markerfacecolor": color if row["pareto"] else "white", "markeredgewidth": 2}
            marker = _MARKERS[number // 10 % len(_MARKERS)]
            shown[row["name"]] = axes.plot(row[name], max(row["kld_mean"], _FLOOR), marker, markersize=9, **style)[0]
        axes.set(xlabel=label, yscale="log")
        axes.margins(x=0.15, y=0.15)
        axes.grid(alpha=0.3)
        if not drawn:
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="#777777")
    left.set_ylabel("mean KL divergence (nats), lower is better")
    if shown:
        title = "filled: Pareto-optimal\n(size, KL, decode)"
        figure.legend(list(shown.values()), list(shown), loc="outside right upper", frameon=False, title=title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
