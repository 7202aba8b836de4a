"""Whether a JSON value fits a JSON Schema, as far as constraints go: a second look at what a constrained model wrote.

Knows the keywords that say what a value is made of. What it does not know it takes as met (`format`, `not`, references out of
the schema, patterns that Python's `re` reads otherwise than ECMAScript does), so it never refuses what fits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, TypeGuard

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "number": (int, float), "boolean": (bool,), "null": (type(None),),
}  # fmt: skip
# Lookbehind, properties, flags, and classes and ends that differ: `$` is also before a last line end in Python.
_OTHER_DIALECT = re.compile(r"\\[pPkcdwsbDWSB]|\(\?|\$|\[\[|&&|\|\||~~|--")


def misfit(value: Any, schema: Any) -> str | None:
    """Why a value does not fit, with its place: `items[2].n is not of type integer`. None where it fits.

    Args:
        value: as `json.loads` gives it.
        schema: a JSON Schema, draft 2020-12 or 7.
    """
    try:
        return next(_misfits(value, schema, "", schema, 0), None)
    except (TypeError, AttributeError, ArithmeticError):  # a schema that makes no sense, or an endless number
        return None


def _misfits(value: Any, schema: Any, place: str, root: Any, depth: int) -> Iterator[str]:
    at = place or "the value"
    if schema is False:
        yield f"{at} may not be there"
    if not isinstance(schema, dict) or depth > 200:
        return

    def inside(other: Any, each: Any = value, where: str = place) -> Iterator[str]:
        return _misfits(each, other, where, root, depth + 1)

    if isinstance(reference := schema.get("$ref"), str):
        yield from inside(_referenced(reference, root))
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is(value, kind) for kind in kinds):
        yield f"{at} is not of type {' or '.join(map(str, kinds))}"
    if "const" in schema and not _same(value, schema["const"]):
        yield f"{at} is not {schema['const']!r}"
    if "enum" in schema and not any(_same(value, other) for other in schema["enum"]):
        yield f"{at} is none of {schema['enum']!r}"
    for other in schema.get("allOf", ()):
        yield from inside(other)
    for key in ("anyOf", "oneOf"):
        if (others := schema.get(key)) and all(next(inside(other), None) for other in others):
            yield f"{at} fits nothing of {key}"
    if isinstance(value, str):
        yield from _text(value, schema, at)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield from _number(value, schema, at)
    elif isinstance(value, list):
        yield from _count(len(value), schema, "Items", at)
        first = schema.get("prefixItems", [])
        rest = schema.get("items", True)
        if isinstance(rest, list):  # as draft 7 has it
            first, rest = rest, schema.get("additionalItems", True)
        for number, each in enumerate(value):
            yield from inside(first[number] if number < len(first) else rest, each, f"{place}[{number}]")
    elif isinstance(value, dict):
        yield from _count(len(value), schema, "Properties", at)
        for name in schema.get("required", ()):
            if name not in value:
                yield f"{at} lacks {name!r}"
        known = schema.get("properties", {})
        patterns = schema.get("patternProperties", {})
        for name, each in value.items():
            where = f"{place}.{name}" if place else name
            if name in known:
                yield from inside(known[name], each, where)
            elif not patterns:  # what matches which pattern is left to the one who wrote it
                yield from inside(schema.get("additionalProperties", True), each, where)


def _text(value: str, schema: dict[str, Any], at: str) -> Iterator[str]:
    yield from _count(len(value), schema, "Length", at)
    pattern = schema.get("pattern")
    if isinstance(pattern, str) and not _OTHER_DIALECT.search(pattern.removesuffix("$")):
        whole = pattern.endswith("$") and not pattern.endswith("\\$")
        try:
            found = re.search(pattern.removesuffix("$") + r"\Z" if whole else pattern, value)
        except re.error:
            return
        if not found:
            yield f"{at} does not match {pattern}"


def _number(value: float, schema: dict[str, Any], at: str) -> Iterator[str]:
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below, unit = (schema.get(key) for key in ("exclusiveMinimum", "exclusiveMaximum", "multipleOf"))
    if (_plain(low) and value < low) or (_plain(high) and value > high):
        yield f"{at} is not from {low if low is not None else 'any'} to {high if high is not None else 'any'}"
    if _plain(above) and value <= above:
        yield f"{at} is not over {above}"
    if _plain(below) and value >= below:
        yield f"{at} is not under {below}"
    if _plain(unit) and unit > 0 and Decimal(str(value)) % Decimal(str(unit)) != 0:
        yield f"{at} is no multiple of {unit}"


def _count(count: int, schema: dict[str, Any], what: str, at: str) -> Iterator[str]:
    if count < schema.get(f"min{what}", 0) or count > schema.get(f"max{what}", count):
        yield f"{at} has {count} of {what.lower()}, too {'few' if count < schema.get(f'min{what}', 0) else 'many'}"


def _plain(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)  # draft 4 has booleans there


def _is(value: Any, kind: Any) -> bool:
    if kind == "integer":
        return _plain(value) and float(value).is_integer() if isinstance(value, float) else _plain(value)
    return isinstance(value, _TYPES.get(kind, (object,))) and not (kind == "number" and isinstance(value, bool))


def _same(one: Any, other: Any) -> bool:
    """JSON's equality: true is not 1, but 1.0 is."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(each, other[name]) for name, each in one.items())
    return bool(one == other)


def _referenced(reference: str, root: Any) -> Any:
    """What `#/…` points to; True, which all fits, where that is nothing here."""
    if not reference.startswith("#"):
        return True
    found = root
    for step in reference.removeprefix("#").split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and step in found:
            found = found[step]
        elif isinstance(found, list) and step.isdigit() and int(step) < len(found):
            found = found[int(step)]
        else:
            return True
    return found
