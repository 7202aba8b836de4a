"""What a benchmark says of its samples: percentiles, spread, and how sure a mean or a ratio is.

Intervals are Student's t at 95 %, over rounds: rounds are few, where the bootstrap's intervals are too narrow, and the
tokens of one round are not independent of one another, so they count as one. A ratio of two speeds is that of their
geometric means, its interval the t interval of the logarithms: of their differences where rounds were measured in pairs,
else Welch's (B. L. Welch, Biometrika 34, 1947).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_SIDE = 0.975  # a 95 % interval leaves 2.5 % on each side


def summary(values: Sequence[float], rounds: Sequence[float] | None = None) -> dict[str, Any]:
    """Percentiles (linear between samples), mean, spread and range.

    Args:
        values: all samples, one or more.
        rounds: the mean of each round, where a round gave several samples; `values` are the rounds when None.

    Returns:
        p50, p95, p99, mean, min, max; std: sample standard deviation of `values`, None with one;
        ci95: [low, high] of the mean over rounds by Student's t, None with one round; n: how many values.
    """
    import numpy as np

    found: dict[str, Any] = {f"p{share}": np.percentile(values, share) for share in (50, 95, 99)}
    found |= {"mean": np.mean(values), "min": min(values), "max": max(values)}
    found = {name: round(float(value), 4) for name, value in found.items()}
    found["std"] = round(float(np.std(values, ddof=1)), 4) if len(values) > 1 else None
    low_high = interval(rounds if rounds is not None else values)
    found["ci95"] = [round(value, 4) for value in low_high] if low_high else None
    found["n"] = len(values)
    return found


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean by Student's t; None with fewer than two values."""
    if len(values) < 2:
        return None
    mean, half = _mean(values), t_quantile(len(values) - 1) * math.sqrt(_variance(values) / len(values))
    return mean - half, mean + half


def t_quantile(df: float, share: float = _SIDE) -> float:
    """The value that Student's t with `df` degrees of freedom stays below with probability `share` (0.5 to 1).

    With t = √df · tan θ the distribution is an integral of cos^(df-1), which is summed by Simpson's rule and turned
    round by bisection.
    """
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        if 0.5 + scale * _cosine_integral(middle, df - 1) < share:
            low = middle
        else:
            high = middle
    return math.sqrt(df) * math.tan(low)


def _cosine_integral(end: float, power: float, steps: int = 400) -> float:
    width = end / steps
    total = 1 + math.cos(end) ** power
    total += sum((4 if i % 2 else 2) * math.cos(i * width) ** power for i in range(1, steps))
    return total * width / 3


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one is as another.

    Attributes:
        value: the ratio of the geometric means.
        low, high: its 95 % interval; None with one round, which says nothing of the spread.
    """

    value: float
    low: float | None
    high: float | None


def ratio(first: Sequence[float], second: Sequence[float], paired: bool) -> Ratio:
    """The ratio of two speeds (first / second).

    Args:
        first, second: speeds of rounds, positive.
        paired: round i of both was measured one right after the other, on the same work.
    """
    a, b = [math.log(value) for value in first], [math.log(value) for value in second]
    if paired:
        differences = [x - y for x, y in zip(a, b, strict=True)]
        middle, around = _mean(differences), interval(differences)
        low, high = around or (None, None)
    else:
        middle = _mean(a) - _mean(b)
        half = _welch_half(a, b)
        low, high = (middle - half, middle + half) if half is not None else (None, None)
    return Ratio(math.exp(middle), None if low is None else math.exp(low), None if high is None else math.exp(high))


def _welch_half(a: Sequence[float], b: Sequence[float]) -> float | None:
    if len(a) < 2 or len(b) < 2:
        return None
    parts = [_variance(a) / len(a), _variance(b) / len(b)]
    together = sum(parts)
    if together == 0:
        return 0.0
    df = together**2 / (parts[0] ** 2 / (len(a) - 1) + parts[1] ** 2 / (len(b) - 1))
    return t_quantile(df) * math.sqrt(together)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _variance(values: Sequence[float]) -> float:
    mean = _mean(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
