"""The front as a table and as a picture: size, speed and divergence, and points that were measured elsewhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgetune.errors import InputError
from edgetune.export.quantize.auto_choice import Choice, Point

_NUMBERS = ("size_mb", "kld_mean")
_SPEEDS = {"decode_tokens_per_s": 1, "prefill_tokens_per_s": 0}  # and digits behind the point


def front_table(choice: Choice, front: Sequence[Point], picked: Point, others: Sequence[dict[str, Any]] = ()) -> str:
    """The front, the point that was picked, and points that were measured elsewhere (`read_points`) as plain columns,
    smallest first."""
    labels = sorted({option.label for unit in choice.units for option in unit.options})
    head = ["", "MB", "KL", "decode/s", "prefill/s", *labels]
    rows = [head]
    points = [*front] if picked in front else [*front, picked]
    for point in sorted(points, key=lambda one: (one.size_mb, one.kld)):
        chosen = [unit.options[at].label for unit, at in zip(choice.units, point.picks, strict=True)]
        rows.append(
            [
                "->" if point == picked else "",
                f"{point.size_mb:.1f}",
                f"{point.kld:.4f}",
                f"{point.decode_tokens_per_s:.1f}",
                f"{point.prefill_tokens_per_s:.0f}",
                *(str(chosen.count(label)) for label in labels),
            ]
        )
    for one in others:
        speeds = [f"{one[name]:.{digits}f}" if name in one else "" for name, digits in _SPEEDS.items()]
        rows.append(["", f"{one['size_mb']:.1f}", f"{one['kld_mean']:.4f}", *speeds, *[""] * len(labels)])
    if others:
        names = ["", *("predicted" for _ in points), *(one["name"] for one in others)]
        body = [[*row, name] for row, name in zip(rows, names, strict=True)]
        rows = [body[0], *sorted(body[1:], key=lambda row: float(row[1]))]
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def read_points(path: Path) -> list[dict[str, Any]]:
    """Measured points of other artifacts: a JSON list of objects with `name`, `size_mb`, `kld_mean` and perhaps
    `decode_tokens_per_s` and `prefill_tokens_per_s`; as `benchmarks/quantization.py` writes it.

    Raises:
        InputError: it is another kind of file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return [
            {
                "name": str(one["name"]),
                **{name: float(one[name]) for name in (*_NUMBERS, *_SPEEDS) if one.get(name) is not None},
            }
            for one in found
            if all(one.get(name) is not None for name in _NUMBERS)
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            "not a JSON list of measured points",
            where=path,
            fix='give a list such as [{"name": "builder int4", "size_mb": 86, "kld_mean": 0.44, '
            '"decode_tokens_per_s": 145}]',
        ) from error


def plot(
    points: Sequence[Point], front: Sequence[Point], picked: Point, others: Sequence[dict[str, Any]], path: Path
) -> None:
    """Draw divergence over size and over speed as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    speeds = [point.decode_tokens_per_s for point in points]
    sizes = [point.size_mb for point in points]
    _panel(axes[0], points, front, picked, [p.size_mb for p in points], "size_mb", speeds, "tokens/s in decoding")
    _panel(axes[1], points, front, picked, speeds, "decode_tokens_per_s", sizes, "size, MB")
    axes[0].set(xlabel="size of the artifact, MB", ylabel="KL divergence from the merged model, nats (predicted)")
    axes[1].set(xlabel="decoding, tokens/s (predicted)")
    for axis, key in zip(axes, ("size_mb", "decode_tokens_per_s"), strict=True):
        shown = [one for one in others if key in one and one["kld_mean"] > 0]
        for one in shown:
            axis.plot(one[key], one["kld_mean"], "x", color="#555555")
        middle = sum(axis.get_xlim()) / 2
        for one in shown:  # names stay within the axes
            left = one[key] > middle
            axis.annotate(
                one["name"],
                (one[key], one["kld_mean"]),
                xytext=(-5 if left else 5, 3),
                textcoords="offset points",
                ha="right" if left else "left",
                fontsize=7,
            )
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False, loc="lower left", fontsize=8)
    figure.savefig(path, dpi=120)


def _panel(
    axis: Any,
    points: Sequence[Point],
    front: Sequence[Point],
    picked: Point,
    at: Sequence[float],
    key: str,
    colours: Sequence[float],
    told: str,
) -> None:
    least = 1e-6  # a logarithm has no zero
    drawn = axis.scatter(at, [max(p.kld, least) for p in points], c=colours, s=9, cmap="viridis", label="choices")
    axis.figure.colorbar(drawn, ax=axis, label=told)
    where = [point.size_mb if key == "size_mb" else point.decode_tokens_per_s for point in front]
    axis.plot(where, [max(p.kld, least) for p in front], "o", mfc="none", color="#2a5d9f", label="in the table")
    own = picked.size_mb if key == "size_mb" else picked.decode_tokens_per_s
    axis.plot(own, max(picked.kld, least), "*", color="#c8442d", markersize=14, label="picked")
