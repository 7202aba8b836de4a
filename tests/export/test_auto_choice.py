"""The choice against trying everything."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetune.errors import InputError
from edgetune.export.quantize.auto_choice import (
    Choice,
    Option,
    Point,
    Rest,
    Unit,
    Wanted,
    describe,
    excess,
    undominated,
)
from edgetune.export.quantize.auto_plot import front_table, read_points

_OPTION = st.tuples(st.floats(0, 1), st.integers(1, 10_000_000), st.floats(0.01, 1), st.floats(0.01, 1))
_UNITS = st.lists(st.lists(_OPTION, min_size=1, max_size=3), min_size=1, max_size=5)


def _choice(units: list[list[tuple[float, int, float, float]]]) -> Choice:
    found = [
        Unit(f"unit {at}", tuple(Option(f"option {n}", {}, *one) for n, one in enumerate(options)))
        for at, options in enumerate(units)
    ]
    return Choice(found, Rest(1_000_000, 0.1, 0.05))


def _all(choice: Choice) -> list[Point]:
    return [choice.point(picks) for picks in itertools.product(*(range(len(unit.options)) for unit in choice.units))]


def _worse(one: Point, than: Point) -> bool:
    """By more than rounding."""
    return (
        than.kld < one.kld - 1e-6
        and than.size_mb < one.size_mb - 1e-6
        and than.decode_tokens_per_s > one.decode_tokens_per_s + 1e-6
        and than.prefill_tokens_per_s > one.prefill_tokens_per_s + 1e-6
    )


@settings(max_examples=40, deadline=None)
@given(_UNITS)
def test_no_assignment_is_better_in_every_respect_than_a_point_of_the_sweep(units) -> None:  # type: ignore[no-untyped-def]
    choice = _choice(units)
    everything = _all(choice)
    for point in choice.all_points():
        assert not any(_worse(point, than) for than in everything)
    front = choice.front(5)
    assert undominated(front) == sorted(front, key=lambda p: (p.kld, p.size_mb))


@settings(max_examples=40, deadline=None)
@given(_UNITS, st.sampled_from(["size_mb", "decode_tokens_per_s", "prefill_tokens_per_s", "kld_mean"]), st.floats(0, 1))
def test_one_limit_is_kept_exactly_when_something_can_keep_it(units, name: str, place: float) -> None:  # type: ignore[no-untyped-def]
    choice = _choice(units)
    everything = _all(choice)
    own = "kld" if name == "kld_mean" else name
    values = [getattr(point, own) for point in everything]
    limit = min(values) * 0.9 + place * (max(values) - min(values) * 0.9)
    wanted = Wanted(**{name: limit or 1e-9})
    good = [point for point in everything if wanted.met(point)]
    if not good:
        with pytest.raises(InputError):
            choice.pick(wanted)
        return
    found = choice.pick(wanted)
    assert wanted.met(found)
    for other in good:  # nothing that is one change away is better
        changes = sum(a != b for a, b in zip(found.picks, other.picks, strict=True))
        if changes == 1:
            assert other.size_mb >= found.size_mb if name == "kld_mean" else other.kld >= found.kld


def test_many_units_come_close_to_the_bound() -> None:
    """With a hundred units the pick is as good as the sweep's line between its neighbours allows."""
    units = [[(0.001 * (at + 1), 500_000, 0.01, 0.01), (0.00001, 1_000_000, 0.02, 0.02)] for at in range(100)]
    choice = _choice(units)
    found = choice.pick(Wanted(size_mb=76.0))
    assert found.size_mb == pytest.approx(76.0)
    assert found.kld == pytest.approx(sum(0.001 * (at + 1) for at in range(50)) + 50 * 0.00001)


def test_the_nearest_is_the_nearest_of_all() -> None:
    rng = random.Random(0)
    refused = 0
    for _ in range(30):
        units = [
            [(rng.random(), rng.randint(1, 9_000_000), rng.uniform(0.01, 1), rng.uniform(0.01, 1)) for _ in range(3)]
            for _ in range(5)
        ]
        choice = _choice(units)
        everything = _all(choice)
        wanted = Wanted(
            size_mb=rng.uniform(1, 2) * min(p.size_mb for p in everything),
            kld_mean=rng.uniform(1, 2) * min(p.kld for p in everything),
            decode_tokens_per_s=rng.uniform(0.5, 1) * max(p.decode_tokens_per_s for p in everything),
        )
        if any(map(wanted.met, everything)):
            continue
        refused += 1
        with pytest.raises(InputError) as error:
            choice.pick(wanted)
        assert describe(min(everything, key=lambda point: excess(point, wanted))) in error.value.what
    assert refused > 15


def test_points_of_other_tools_stand_in_the_table(tmp_path: Path) -> None:
    """As the benchmark writes them, what does not load included."""
    points = [
        {"name": "builder int4", "size_mb": 1.5, "kld_mean": 0.44, "decode_tokens_per_s": 145.2, "top1": 0.6},
        {"name": "builder int8", "size_mb": 9, "kld_mean": 0.01, "prefill_tokens_per_s": 900},
        {"name": "builder int2", "failed": "no"},
    ]
    (tmp_path / "points.json").write_text(json.dumps(points))
    others = read_points(tmp_path / "points.json")
    choice = _choice([[(0.5, 100_000, 0.1, 0.1), (0.01, 900_000, 0.3, 0.3)]] * 4)
    lines = front_table(choice, choice.front(), choice.pick(Wanted(kld_mean=1.1)), others).splitlines()
    assert [line.split()[:3] for line in lines if "builder int4" in line] == [["1.5", "0.4400", "145.2"]]
    assert lines[-1].split() == ["9.0", "0.0100", "900", "builder", "int8"] and len({len(line) for line in lines}) == 1
    sizes = [float(line.replace("->", "").split()[0]) for line in lines[1:]]
    assert sizes == sorted(sizes) and sum("predicted" in line for line in lines) == len(lines) - 3


def test_two_limits_that_exclude_each_other_name_the_nearest() -> None:
    choice = _choice([[(0.5, 100_000, 0.1, 0.1), (0.01, 900_000, 0.3, 0.3)]] * 4)
    with pytest.raises(InputError, match="loosen") as error:
        choice.pick(Wanted(size_mb=2.0, kld_mean=0.05))
    assert "size_mb 2, kld_mean 0.05" in error.value.what
    both = Wanted(size_mb=1.5, kld_mean=10)
    assert both.met(choice.pick(both))
    assert excess(choice.pick(both), both) == 0
