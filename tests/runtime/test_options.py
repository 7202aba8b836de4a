"""Ranges of the generation options, and stop strings in pieces of text."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetune.errors import InputError
from edgetune.runtime.options import GenerationOptions
from edgetune.runtime.stops import StopFilter


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("max_tokens", "9"),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", None),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("top_k", -1),
        ("top_k", 0.5),
        ("top_k", None),
        ("seed", -1),
        ("seed", 2**31),
        ("seed", 1.0),
        ("stop", "a string"),
        ("stop", ("",)),
        ("stop", (1,)),
        ("stop", ("x",) * 17),
        ("json_schema", "{}"),
        ("json_schema", [1]),
    ],
)
def test_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(InputError) as caught:
        GenerationOptions(**{name: value})
    assert caught.value.where == name


def test_limits_themselves_are_fine() -> None:
    options = GenerationOptions(max_tokens=1, temperature=2, top_p=1, top_k=0, seed=2**31 - 1, stop=["a"])  # type: ignore[arg-type]
    assert options.stop == ("a",)
    GenerationOptions(temperature=0, top_p=1e-9, seed=0, json_schema={})


def show(stops: tuple[str, ...], pieces: list[str]) -> tuple[str, bool]:
    filtered = StopFilter(stops)
    text = "".join(filtered.feed(piece) for piece in pieces)
    return text + filtered.rest(), filtered.found


def test_stop_across_pieces() -> None:
    assert show(("STOP",), ["one S", "TO", "P two"]) == ("one ", True)
    assert show(("STOP",), ["one S", "TO", " two STO"]) == ("one STO two STO", False)
    assert show(("aab",), ["a", "a", "a", "b"]) == ("a", True)  # the beginning may begin anew
    assert show((), ["any", "thing"]) == ("anything", False)


def test_text_is_held_no_longer_than_needed() -> None:
    filtered = StopFilter(("<end>",))
    assert filtered.feed("abc<e") == "abc"
    assert filtered.feed("x") == "<ex"
    assert filtered.feed("y") == "y"


@given(
    st.text("ab", max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 12), max_size=5),
)
def test_pieces_do_not_matter(text: str, stops: list[str], cuts: list[int]) -> None:
    at = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(at)]
    shown, found = show(tuple(stops), pieces)
    assert (shown, found) == show(tuple(stops), list(text))
    assert found == any(stop in text for stop in stops)
    assert not any(stop in shown for stop in stops)
    assert text.startswith(shown)
    if not found:
        assert shown == text
