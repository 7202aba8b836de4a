"""The second look at JSON: it agrees with the reference implementation, and never refuses what fits."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetune.runtime.json_schema import misfit

PLAIN: Any = (
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([0.5, 1.0, -2.5]) | st.text("ab1", max_size=3)
)
VALUES: Any = st.recursive(
    PLAIN, lambda deeper: st.lists(deeper, max_size=3) | st.dictionaries(st.sampled_from("abc"), deeper, max_size=3)
)
LIMITS = {
    "minLength": st.integers(0, 3), "maxLength": st.integers(0, 3), "minimum": st.integers(-2, 2), "maximum": st.integers(-2, 2),
    "exclusiveMinimum": st.integers(-2, 2), "exclusiveMaximum": st.integers(-2, 2), "multipleOf": st.sampled_from([1, 2, 0.5]),
    "minItems": st.integers(0, 2), "maxItems": st.integers(0, 2), "minProperties": st.integers(0, 2),
    "maxProperties": st.integers(0, 2), "required": st.lists(st.sampled_from("abc"), max_size=2, unique=True),
    "type": st.sampled_from(["object", "array", "string", "number", "integer", "boolean", "null", ["string", "null"]]),
    "const": PLAIN, "enum": st.lists(VALUES, min_size=1, max_size=3), "pattern": st.sampled_from(["a", "^a", "b$", "^[ab]+$"]),
}  # fmt: skip


def schemas(deeper: Any) -> Any:
    within = {
        "properties": st.dictionaries(st.sampled_from("abc"), deeper, max_size=2), "additionalProperties": deeper,
        "items": deeper, "prefixItems": st.lists(deeper, min_size=1, max_size=2), "anyOf": st.lists(deeper, min_size=1, max_size=2),
        "allOf": st.lists(deeper, min_size=1, max_size=2),
    }  # fmt: skip
    return st.fixed_dictionaries({}, optional={**LIMITS, **within})


@given(st.recursive(st.booleans() | st.fixed_dictionaries({}, optional=LIMITS), schemas, max_leaves=6), VALUES)
def test_it_agrees_with_the_reference(schema: Any, value: Any) -> None:
    assert (misfit(value, schema) is None) == jsonschema.Draft202012Validator(schema).is_valid(value)


@pytest.mark.parametrize(
    ("value", "schema", "what"),
    [
        ({"n": [1, 2, "x"]}, {"properties": {"n": {"items": {"type": "integer"}}}}, r"n[2] is not of type integer"),
        ({"a": 1, "b": 2}, {"properties": {"a": {}}, "additionalProperties": False}, "b may not be there"),
        ({}, {"required": ["a"]}, "the value lacks 'a'"),
        ([1], {"$defs": {"x": {"type": "array", "items": {"$ref": "#/$defs/y"}}, "y": {"const": 2}}, "$ref": "#/$defs/x"}, "[0] is not 2"),
        ({"next": {"next": {"next": 1}}}, {"type": "object", "properties": {"next": {"$ref": "#"}}}, "next.next.next is not of type"),
        ([1, "a"], {"items": [{"type": "integer"}], "additionalItems": {"type": "integer"}}, "[1] is not of type integer"),
    ],
)  # fmt: skip
def test_it_says_where(value: Any, schema: Any, what: str) -> None:
    assert what in (misfit(value, schema) or "")


@pytest.mark.parametrize(
    "schema",
    [
        {"format": "date"}, {"not": {}}, {"$ref": "https://example.org/x"}, {"$ref": "#/missing"}, {"pattern": r"\p{L}"},
        {"pattern": "(("}, {"pattern": r"^\d\d$"}, {"pattern": "(?<=x)y"}, {"unheard": 1}, {"patternProperties": {"z": False}},
        {"properties": 3}, {"required": 1}, {"enum": None},
    ],
)  # fmt: skip
def test_what_it_does_not_know_is_met(schema: Any) -> None:
    assert misfit(float("inf"), {"multipleOf": 2}) is None
    assert misfit("abc", schema) is None and misfit({"a": 1}, schema) is None
