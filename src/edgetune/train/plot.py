"""The loss plot of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot_loss(metrics: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Draw training and validation loss over optimizer steps as a PNG.

    Args:
        metrics: the rows of `metrics.jsonl`: `step` with `loss` (training) or `validation_loss`, in nats a token.
        title: printed above.
        path: the PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    train = [(row["step"], row["loss"]) for row in metrics if "loss" in row]
    validation = [(row["step"], row["validation_loss"]) for row in metrics if "validation_loss" in row]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    if train:
        axes.plot(*zip(*train, strict=True), color="#9db7d5", linewidth=1, label="training, each step")
        if len(train) >= 10:
            axes.plot(*zip(*_smooth(train), strict=True), color="#2a5d9f", linewidth=2, label="training, smoothed")
    if validation:
        best = min(loss for _, loss in validation)
        axes.plot(
            *zip(*validation, strict=True),
            "o-",
            color="#c8442d",
            linewidth=2,
            label=f"validation, best {best:.3f}",
        )
    axes.set(title=title, xlabel="optimizer step", ylabel="loss (nats a token)")
    axes.margins(y=0.15)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def _smooth(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Exponential moving average over about a tenth of the points, started at the mean of the first few."""
    keep = 1 - 1 / max(3, len(points) / 10)
    value = sum(y for _, y in points[:5]) / len(points[:5])
    out = []
    for x, y in points:
        value = keep * value + (1 - keep) * y
        out.append((x, value))
    return out
