"""The choice against trying everything."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetune.errors import InputError
from edgetune.export.quantize.auto_choice import Choice, Option, Point, Rest, Unit, Wanted, excess, undominated

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


def test_two_limits_that_exclude_each_other_name_the_nearest() -> None:
    choice = _choice([[(0.5, 100_000, 0.1, 0.1), (0.01, 900_000, 0.3, 0.3)]] * 4)
    with pytest.raises(InputError, match="loosen") as error:
        choice.pick(Wanted(size_mb=2.0, kld_mean=0.05))
    assert "size_mb 2, kld_mean 0.05" in error.value.what
    both = Wanted(size_mb=1.5, kld_mean=10)
    assert both.met(choice.pick(both))
    assert excess(choice.pick(both), both) == 0
