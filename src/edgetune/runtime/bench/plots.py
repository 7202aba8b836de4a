"""Plots as SVG, written out: lines, bands, bars and points on two axes. No script, no font, no file from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 440, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 14, 14, 46
_APART = 14  # pixels between words that stand upright
COLOURS = 6  # classes c0 … c5 of the page's style sheet


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        label: what it shows, with its unit.
        low, high: the range that is drawn.
        log: powers of ten have equal distances.
        names: places with their names, in place of numbers.
    """

    label: str
    low: float
    high: float
    log: bool = False
    names: Sequence[tuple[float, str]] = ()

    def share(self, value: float) -> float:
        """Where a value lies, 0 at the axis' beginning and 1 at its end; outside: at the border."""
        low, high, value = map(_log, (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return min(1.0, max(0.0, (value - low) / ((high - low) or 1)))

    def ticks(self) -> list[tuple[float, str]]:
        """Round values inside the range, with their text."""
        if self.names:
            return list(self.names)
        if self.log:
            powers = range(math.floor(_log(self.low)), math.ceil(_log(self.high)) + 1)
            steps = (1, 2, 5) if self.high / self.low < 1000 else (1,)
            inside = [s * 10.0**p for p in powers for s in steps if self.low <= s * 10.0**p <= self.high]
            return [(value, number(value)) for value in inside]
        step = nice_step(self.high - self.low)
        first = math.ceil(self.low / step - 1e-9)
        count = math.floor((self.high - first * step) / step + 1e-9)
        return [((first + n) * step, number((first + n) * step)) for n in range(count + 1)]


def nice_step(span: float, steps: int = 5) -> float:
    """A step of 1, 2 or 5 times a power of ten that divides a span into about so many."""
    if span <= 0 or not math.isfinite(span):
        return 1.0
    raw = span / steps
    power = 10.0 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 5, 10) if raw <= factor * power * 1.0001)


def number(value: float) -> str:
    """A value as an axis shows it."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-4 else f"{value:.0e}"


def _log(value: float) -> float:
    return math.log10(max(value, 1e-12))


@dataclass
class Plot:
    """A plot under way: draw on it, then `svg()`.

    Attributes:
        title: for readers of the screen.
        x, y: its axes.
    """

    title: str
    x: Axis
    y: Axis
    height: int = HEIGHT
    left: int = _LEFT
    _parts: list[str] = field(default_factory=list)
    _named: float = -1e9

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Place of a value in the picture."""
        wide, high = WIDTH - self.left - _RIGHT, self.height - _TOP - _BOTTOM
        return round(self.left + wide * self.x.share(x), 1), round(_TOP + high * (1 - self.y.share(y)), 1)

    def line(self, points: Sequence[tuple[float, float]], colour: int, title: str = "", dashed: bool = False) -> None:
        """A line through points."""
        kind = "line dashed" if dashed else "line"
        path = " ".join(f"{a},{b}" for a, b in (self.at(x, y) for x, y in points))
        self._parts.append(f'<polyline class="{kind} c{colour % COLOURS}" points="{path}">{_tip(title)}</polyline>')

    def band(self, points: Sequence[tuple[float, float, float]], colour: int) -> None:
        """The area between two lines: x, low, high."""
        upper = [self.at(x, high) for x, _, high in points]
        lower = [self.at(x, low) for x, low, _ in reversed(points)]
        path = " ".join(f"{a},{b}" for a, b in upper + lower)
        self._parts.append(f'<polygon class="band c{colour % COLOURS}" points="{path}"/>')

    def dot(self, x: float, y: float, colour: int, title: str, radius: float = 4) -> None:
        """A point that tells its numbers when it is pointed at."""
        a, b = self.at(x, y)
        self._parts.append(
            f'<circle class="dot c{colour % COLOURS}" cx="{a}" cy="{b}" r="{radius:.1f}">{_tip(title)}</circle>'
        )

    def bar(self, x: float, end: float, y: float, thick: float, colour: int, title: str) -> None:
        """A horizontal bar from `x` to `end`, so thick in pixels."""
        (a, b), (c, _) = self.at(x, y), self.at(end, y)
        self._parts.append(
            f'<rect class="bar c{colour % COLOURS}" x="{a}" y="{b - thick / 2:.1f}" width="{max(c - a, 1):.1f}" height="{thick}">{_tip(title)}</rect>'
        )

    def rule(self, value: float, text: str = "", upright: bool = False) -> None:
        """A thin line across, at a value of y, or of x when upright, with a word along it where there is room."""
        if upright:
            a, b = self.at(value, self.y.high)
            _, end = self.at(value, self.y.low)
            self._parts.append(f'<line class="rule" x1="{a}" y1="{b}" x2="{a}" y2="{end}"/>')
            if text and a - self._named >= _APART:
                self._named = a
                place = f'transform="translate({a + 11} {end - 6}) rotate(-90)"'
                self._parts.append(f'<text class="note" {place}>{escape(text)}</text>')
        else:
            a, b = self.at(self.x.low, value)
            self._parts.append(f'<line class="rule" x1="{a}" y1="{b}" x2="{WIDTH - _RIGHT}" y2="{b}"/>')
            self._parts.append(
                f'<text class="note" x="{WIDTH - _RIGHT}" y="{b + 12}" text-anchor="end">{escape(text)}</text>'
            )

    def word(self, x: float, y: float, text: str, place: tuple[float, float] = (0, -9), anchor: str = "middle") -> None:
        """Text beside a point, so many pixels away from it."""
        a, b = self.at(x, y)
        at = f'x="{a + place[0]:.1f}" y="{b + place[1]:.1f}"'
        self._parts.append(f'<text class="note" {at} text-anchor="{anchor}">{escape(text)}</text>')

    def svg(self) -> str:
        """The picture, with its axes."""
        axes = []
        for value, text in self.x.ticks():
            a, b = self.at(value, self.y.low)
            axes.append(f'<line class="grid" x1="{a}" y1="{_TOP}" x2="{a}" y2="{b}"/>')
            axes.append(f'<text x="{a}" y="{b + 17}" text-anchor="middle">{escape(text)}</text>')
        for value, text in self.y.ticks():
            a, b = self.at(self.x.low, value)
            axes.append(f'<line class="grid" x1="{a}" y1="{b}" x2="{WIDTH - _RIGHT}" y2="{b}"/>')
            axes.append(f'<text x="{a - 6}" y="{b + 4}" text-anchor="end">{escape(text)}</text>')
        middle = (self.left + WIDTH - _RIGHT) / 2
        axes.append(f'<text x="{middle}" y="{self.height - 6}" text-anchor="middle">{escape(self.x.label)}</text>')
        if self.y.label:
            half = (_TOP + self.height - _BOTTOM) / 2
            axes.append(
                f'<text transform="translate(12 {half}) rotate(-90)" text-anchor="middle">{escape(self.y.label)}</text>'
            )
        return (
            f'<svg viewBox="0 0 {WIDTH} {self.height}" role="img"><title>{escape(self.title)}</title>'
            + "".join(axes + self._parts)
            + "</svg>"
        )


def _tip(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""


def legend(names: Sequence[str], styles: Sequence[str] = ()) -> str:
    """What the colours stand for, and whole and dashed lines, as a list that wraps; nothing of nothing."""
    items = "".join(f'<li><i class="c{n % COLOURS}"></i>{escape(name)}</li>' for n, name in enumerate(names))
    for kind, name in zip(("solid", "dashed"), styles, strict=False):
        items += f'<li><i class="{kind}"></i>{escape(name)}</li>'
    return f'<ul class="legend">{items}</ul>' if items else ""


def span(values: Sequence[float], zero: bool = False, margin: float = 0.05) -> tuple[float, float]:
    """A range that holds all values with some room, from 0 when `zero`."""
    low, high = min(values), max(values)
    room = (high - low) * margin or abs(high) * margin or 1.0
    return (0.0 if zero else low - room), high + room


def binned(
    points: Sequence[tuple[float, float]], bins: int, of: Callable[[Sequence[float]], tuple[float, float, float]]
) -> list[tuple[float, float, float, float]]:
    """Points gathered by x into bins of equal width: the bin's middle, and what `of` says of its values."""
    low, high = min(x for x, _ in points), max(x for x, _ in points)
    width = (high - low) / bins or 1.0
    found: dict[int, list[tuple[float, float]]] = {}
    for x, y in points:
        found.setdefault(min(int((x - low) / width), bins - 1), []).append((x, y))
    return [(sum(x for x, _ in part) / len(part), *of([y for _, y in part])) for _, part in sorted(found.items())]
