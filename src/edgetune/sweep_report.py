"""What a sweep came to: the table, sweep.json and the plot."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.files import digest
from edgetune.progress import clock

if TYPE_CHECKING:
    from edgetune.sweep import Sweep

FORMAT = "edgetune/sweep/1"


def short_keys(keys: Iterable[str]) -> list[str]:
    """Keys without their section where that leaves no doubt."""
    short = [key.rsplit(".", 1)[-1] for key in keys]
    return [name if short.count(name) == 1 else key for name, key in zip(short, keys, strict=True)]


def shown(value: Any) -> str:
    """A value as people write it; of a path its last part."""
    if isinstance(value, str):
        return Path(value).name if Path(value).is_absolute() else value
    return json.dumps(value)


def as_json(sweep: Sweep) -> dict[str, Any]:
    """What `sweep.json` holds and `--json` prints; points by validation loss."""
    best = sweep.best()
    return {
        "format": FORMAT,
        "recipe": str(sweep.recipe),
        "folder": str(sweep.folder),
        "axes": sweep.axes,
        "points": [
            {
                "values": point.values,
                "run": str(point.loaded.run_dir),
                "state": "trained" if point.report else ("failed" if point.error else "to be trained"),
                "error": point.error,
                **{name: (point.report or {}).get(name) for name in _TOLD},
            }
            for point in sweep.ranked()
        ],
        "comparable": sweep.comparable,
        "best": None if best is None else {"values": best.values, "run": str(best.loaded.run_dir)},
        "next": None if best is None else best.command,
    }


# Of a training's report.
_TOLD = ("validation", "best_step", "steps", "tokens_per_s", "peak_rss_mb", "seconds_in_all")


def table(sweep: Sweep) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the result, best first."""
    columns = [
        *short_keys(sweep.axes),
        "validation loss",
        "perplexity",
        "token accuracy",
        "best step",
        "tokens/s",
        "peak memory",
    ]
    rows = []
    for point in sweep.ranked():
        values = [shown(value) for value in point.values.values()]
        if point.report is None:
            rows.append([*values, "failed" if point.error else "to be trained", *["-"] * 6])
            continue
        told, after = point.report, point.report["validation"]["after"]
        rows.append(
            [
                *values,
                f"{after['loss']:.4f}",
                f"{after['perplexity']:.3f}",
                f"{after['token_accuracy']:.1%}",
                f"{told['best_step']} of {told['steps']}",
                f"{told['tokens_per_s'] or 0:.0f}",
                f"{told['peak_rss_mb']:,.0f} MB",
                clock(told["seconds_in_all"]),
            ]
        )
    return [*columns, "time"], rows


def plot(sweep: Sweep, path: Path) -> None:
    """Draw validation loss over the values of each key as a PNG: every trained point, and a line through the best ones."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    trained = [point for point in sweep.points if point.report]
    best = min(trained, key=lambda point: point.loss)
    figure = Figure(figsize=(max(5.0, 4.0 * len(sweep.axes)), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (key, values) in zip(
        figure.subplots(1, len(sweep.axes), sharey=True, squeeze=False)[0], sweep.axes.items(), strict=True
    ):
        ordered = sorted(values) if all(isinstance(v, int | float) for v in values) else values
        place = {digest(value): at for at, value in enumerate(ordered)}
        at = [place[digest(point.values[key])] for point in trained]
        axes.plot(at, [point.loss for point in trained], "o", color="#9db7d5", label="each point")
        lowest = {x: min(p.loss for p, y in zip(trained, at, strict=True) if y == x) for x in sorted(set(at))}
        axes.plot(list(lowest), list(lowest.values()), "-", color="#2a5d9f", linewidth=2, label="best of each value")
        axes.plot(
            place[digest(best.values[key])],
            best.loss,
            "o",
            color="#c8442d",
            markersize=9,
            label=f"best, {best.loss:.3f}",
        )
        axes.set_xticks(
            range(len(ordered)), [shown(value) for value in ordered], rotation=30 if len(ordered) > 4 else 0
        )
        axes.set(xlabel=key, xlim=(-0.5, len(ordered) - 0.5))
        axes.grid(alpha=0.3)
        axes.margins(y=0.15)
    figure.axes[0].set_ylabel("best validation loss (nats a token)")
    figure.axes[-1].legend(frameon=False)
    figure.savefig(path, dpi=120)
