"""Which option each unit of a model gets: the Pareto front of divergence, size and time, and the point that limits want.

A unit is a set of matrices that are decided together. Divergence, bytes and seconds of units add up, so for any price
of a byte and of a second each unit's cheapest option can be taken by itself: every such choice is on the front. Prices
from nothing to very much give the front's convex part, and with a hundred units there is little between. What limits
leave free after that is used up by changing units one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgetune.errors import InputError
from edgetune.export.quantize.grid import Grid
from edgetune.export.quantize.plan import Method

if TYPE_CHECKING:
    import numpy as np

_PRICES = 28  # of each kind, with zero
_KLD, _BYTES, _DECODE, _PREFILL = range(4)


@dataclass(frozen=True)
class Option:
    """One way to store and compute a unit.

    Attributes:
        label: the candidate's name.
        grids: by the matrices' full names.
        kld: mean KL divergence that it alone brings, in nats.
        bytes: in the graph.
        decode_s, prefill_s: seconds of a token when one is computed, and when 128 are computed at once.
        method: of 4-bit codes, or None.
    """

    label: str
    grids: dict[str, Grid]
    kld: float
    bytes: int
    decode_s: float
    prefill_s: float
    method: Method | None = None


@dataclass(frozen=True)
class Unit:
    """Matrices that are decided together, such as `model.layers.3 gate_proj+up_proj`."""

    name: str
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Rest:
    """What all choices have in common: bytes of all other files and weights, seconds of a token outside the matrices."""

    bytes: int = 0
    decode_s: float = 0.0
    prefill_s: float = 0.0


@dataclass(frozen=True)
class Point:
    """A whole assignment, with what is predicted of it.

    Attributes:
        picks: an index into each unit's options.
    """

    picks: tuple[int, ...]
    kld: float
    size_mb: float
    decode_tokens_per_s: float
    prefill_tokens_per_s: float


@dataclass(frozen=True)
class Wanted:
    """Limits; None where there is none."""

    size_mb: float | None = None
    decode_tokens_per_s: float | None = None
    prefill_tokens_per_s: float | None = None
    kld_mean: float | None = None

    def met(self, point: Point) -> bool:
        """Whether a point keeps all of them."""
        return not self.missed(point)

    def missed(self, point: Point) -> list[str]:
        """The limits that a point does not keep."""
        found = []
        if self.size_mb is not None and point.size_mb > self.size_mb:
            found.append("size_mb")
        if self.decode_tokens_per_s is not None and point.decode_tokens_per_s < self.decode_tokens_per_s:
            found.append("decode_tokens_per_s")
        if self.prefill_tokens_per_s is not None and point.prefill_tokens_per_s < self.prefill_tokens_per_s:
            found.append("prefill_tokens_per_s")
        if self.kld_mean is not None and point.kld > self.kld_mean:
            found.append("kld_mean")
        return found

    @property
    def only_divergence(self) -> bool:
        """Whether nothing but the divergence is limited."""
        return self.size_mb is None and self.decode_tokens_per_s is None and self.prefill_tokens_per_s is None


class Choice:
    """All assignments of options to units.

    Args:
        units: what is to be decided.
        rest: what they have in common.
        guessed: the divergences are guesses, of which nothing is told.
    """

    def __init__(self, units: Sequence[Unit], rest: Rest, *, guessed: bool = False) -> None:
        import numpy as np

        self.units, self.rest, self._guessed = units, rest, guessed
        most = max(len(unit.options) for unit in units)
        self._costs = np.full((4, len(units), most), np.inf)  # by kind, unit and option
        for at, unit in enumerate(units):
            for number, one in enumerate(unit.options):
                self._costs[:, at, number] = one.kld, one.bytes, one.decode_s, one.prefill_s
        self._fixed = np.array([0.0, rest.bytes, rest.decode_s, rest.prefill_s])
        self._at = np.arange(len(units))
        self._points: list[Point] = []

    def point(self, picks: Sequence[int]) -> Point:
        """What is predicted of an assignment."""
        import numpy as np

        kld, size, decode, prefill = (float(one) for one in self._sums(np.asarray(picks)))
        return Point(tuple(int(pick) for pick in picks), kld, size / 1e6, 1 / decode, 1 / prefill)

    def all_points(self) -> list[Point]:
        """The assignments that are the best ones under some price of bytes and seconds, without repetition."""
        if not self._points:
            picks = dict.fromkeys(tuple(self._cheapest(prices).tolist()) for prices in self._prices())
            self._points = [self.point(one) for one in picks]
        return self._points

    def front(self, count: int = 12) -> list[Point]:
        """Points from the smallest divergence to the smallest size, none worse in every respect than another.

        Args:
            count: how many of them, spread evenly over the sizes.
        """
        points = sorted(undominated(self.all_points()), key=lambda point: (point.size_mb, point.kld))
        if len(points) <= count:
            return points
        low, high = points[0].size_mb, points[-1].size_mb
        kept: dict[int, Point] = {}
        for point in points:  # of those of about one size, the one with the least divergence times time
            place = round((point.size_mb - low) / max(high - low, 1e-9) * (count - 1))
            old = kept.get(place)
            if old is None or _worth(point) < _worth(old):
                kept[place] = point
        return [kept[place] for place in sorted(kept)]

    def pick(self, wanted: Wanted) -> Point:
        """The point that the limits want: of those that keep them all the one with the least divergence, or, where only
        the divergence is limited, the smallest.

        Raises:
            InputError: nothing keeps them; it says what comes nearest.
        """
        points = self.all_points()
        good = [point for point in points if wanted.met(point)]
        if not good:
            # the front's convex part may lie around what is wanted: go there from what misses it least
            near = list(self._repaired(points, wanted))
            good = [point for point in near if wanted.met(point)]
        if not good:
            near_most = min(near, key=lambda point: excess(point, wanted))
            raise _unreachable(near_most, wanted, describe(near_most, kld=not self._guessed))
        best = min(
            good, key=(lambda p: (p.size_mb, p.kld)) if wanted.only_divergence else (lambda p: (p.kld, p.size_mb))
        )
        return self._improved(best, wanted)

    def _sums(self, picks: np.ndarray) -> np.ndarray:
        found: np.ndarray = self._costs[:, self._at, picks].sum(1) + self._fixed
        return found

    def _cheapest(self, prices: np.ndarray) -> np.ndarray:
        """Each unit's cheapest option under these prices; options that are missing cost more than any other."""
        import numpy as np

        known = np.where(np.isfinite(self._costs), self._costs, 1e30)
        found: np.ndarray = np.tensordot(prices, known, 1).argmin(-1)
        return found

    def _prices(self) -> Iterator[np.ndarray]:
        """Weights of divergence, bytes, decoding and prefill: one kind after the other from nothing to everything."""
        import numpy as np

        known = np.where(np.isfinite(self._costs), self._costs, np.nan)
        spread = np.nansum(np.nanmax(known, -1) - np.nanmin(known, -1), -1)
        unit = spread[_KLD] / np.where(spread > 0, spread, np.inf)  # one price makes both spreads weigh the same
        steps = np.concatenate([[0.0], np.logspace(-5, 4, _PRICES - 1)])
        small = 1e-9
        for per_byte in steps:
            for per_second in steps:
                for prompts in (0.0, 0.1, 1.0):  # of the price of a second, for prompts: they are read many at a time
                    size, time = per_byte * unit[_BYTES], per_second * unit[_DECODE]
                    prefill = prompts * per_second * unit[_PREFILL]
                    yield np.array([1.0, size + small * unit[_BYTES], time + small * unit[_DECODE], prefill])
        for kind in (_BYTES, _DECODE, _PREFILL):  # nothing but this one counts; the others decide between equals
            prices = np.where(spread > 0, small / np.where(spread > 0, spread, 1), 0)
            prices[kind] = 1 / spread[kind] if spread[kind] > 0 else 0
            yield prices

    def _improved(self, point: Point, wanted: Wanted) -> Point:
        """Change one unit at a time for the better, as long as the limits are kept."""
        while True:
            near = [one for one in self._neighbours(point) if wanted.met(one)]
            if wanted.only_divergence:
                better = [one for one in near if (one.size_mb, one.kld) < (point.size_mb, point.kld)]
                best = min(better, key=lambda p: (p.size_mb, p.kld), default=None)
            else:
                better = [one for one in near if one.kld < point.kld]
                best = min(better, key=lambda p: (p.kld, p.size_mb), default=None)
            if best is None:
                return point
            point = best

    def _repaired(self, points: Sequence[Point], wanted: Wanted) -> Iterator[Point]:
        """What comes nearest to the limits, by changes of one unit or two at a time from the points that miss them least."""
        for start in sorted(points, key=lambda point: excess(point, wanted))[:8]:
            point = start
            while not wanted.met(point):
                best = self._nearer(point, wanted)
                if excess(best, wanted) >= excess(point, wanted) - 1e-12:
                    break
                point = best
            yield point

    def _nearer(self, point: Point, wanted: Wanted) -> Point:
        """The best of what differs from a point in one unit; where none is nearer, in two."""
        import numpy as np

        picks = np.asarray(point.picks)
        unit, option = np.nonzero(np.isfinite(self._costs[_KLD]))
        change = (
            self._costs[:, unit, option] - self._costs[:, unit, picks[unit]]
        ).T  # by change and kind; none for its own
        sums = self._sums(picks)
        alone = _excess(sums + change, wanted)
        one = int(alone.argmin())
        if alone[one] < excess(point, wanted) - 1e-12:
            return self.point([*point.picks[: unit[one]], option[one], *point.picks[unit[one] + 1 :]])
        best, found = np.inf, picks
        for at in range(len(change)):
            left = _excess(sums + change[at] + change, wanted)
            left[unit == unit[at]] = np.inf
            with_it = int(left.argmin())
            if left[with_it] < best:
                best, found = left[with_it], picks.copy()
                found[unit[with_it]], found[unit[at]] = option[with_it], option[at]
        return self.point(found.tolist())

    def _neighbours(self, point: Point) -> Iterator[Point]:
        for at, unit in enumerate(self.units):
            for other in range(len(unit.options)):
                if other != point.picks[at]:
                    yield self.point([*point.picks[:at], other, *point.picks[at + 1 :]])


def undominated(points: Sequence[Point]) -> list[Point]:
    """The points that no other is at least as good as in divergence, size and speed of decoding and better in one."""

    def costs(point: Point) -> tuple[float, float, float]:
        return point.kld, point.size_mb, -point.decode_tokens_per_s

    kept: list[Point] = []
    for point in sorted(points, key=lambda one: (*costs(one), -one.prefill_tokens_per_s)):
        if not any(all(a <= b for a, b in zip(costs(one), costs(point), strict=True)) for one in kept):
            kept.append(point)
    return kept


def excess(point: Point, wanted: Wanted) -> float:
    """By how much a point misses the limits: the sum of the shares."""
    import numpy as np

    sums = point.kld, point.size_mb * 1e6, 1 / point.decode_tokens_per_s, 1 / point.prefill_tokens_per_s
    return float(_excess(np.array([sums]), wanted)[0])


def _excess(sums: np.ndarray, wanted: Wanted) -> np.ndarray:
    """The same of many choices: (choices, 4) sums of divergence, bytes, and seconds a token."""
    import numpy as np

    limits = (
        wanted.kld_mean,
        None if wanted.size_mb is None else wanted.size_mb * 1e6,
        None if wanted.decode_tokens_per_s is None else 1 / wanted.decode_tokens_per_s,
        None if wanted.prefill_tokens_per_s is None else 1 / wanted.prefill_tokens_per_s,
    )
    found = np.zeros(len(sums))
    for kind, limit in enumerate(limits):
        if limit is not None:
            found += np.maximum(0.0, sums[:, kind] / limit - 1)
    return found


def _worth(point: Point) -> float:
    return point.kld / point.decode_tokens_per_s


def _unreachable(near: Point, wanted: Wanted, described: str) -> InputError:
    limits = {name: value for name, value in vars(wanted).items() if value is not None}
    told = ", ".join(f"{name} {value:g}" for name, value in limits.items())
    return InputError(
        f"no choice of grids meets {told}; the nearest is predicted to have {described}",
        where="export.auto",
        fix=f"loosen {' or '.join(wanted.missed(near))}",
    )


def describe(point: Point, *, kld: bool = True) -> str:
    """A point's predictions as people read them, with the divergence or without."""
    return (
        f"{point.size_mb:.1f} MB, {f'KL {point.kld:.4f}, ' if kld else ''}{point.decode_tokens_per_s:.1f} tokens/s in decoding and "
        f"{point.prefill_tokens_per_s:,.0f} in prefill"
    )


def as_json(point: Point) -> dict[str, Any]:
    """A point's predictions for reports."""
    return {
        "kld_mean": round(point.kld, 6),
        "size_mb": round(point.size_mb, 3),
        "decode_tokens_per_s": round(point.decode_tokens_per_s, 2),
        "prefill_tokens_per_s": round(point.prefill_tokens_per_s, 1),
    }
