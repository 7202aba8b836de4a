"""What callers give, checked: a function for each kind of value. Each raises InputError, which names the argument."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from edgetune.errors import EdgetuneError, InputError

_SHOWN = 60  # characters of a wrong value


def shown(value: Any) -> str:
    """A value as messages show it: the beginning of it."""
    try:
        found = repr(value)
    except (ValueError, RecursionError):  # Python writes no number of more than 4,300 digits
        found = f"a number of {value.bit_length():,} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    return found if len(found) <= _SHOWN else f"{found[:_SHOWN]}…"


def whole(where: str, value: Any, low: int, high: int | None = None) -> int:
    """A whole number, numpy's too, from `low` to `high`."""
    found = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None
    if found is None or found < low or (high is not None and found > high):
        span = f"from {low}" if high is None else f"from {low} to {high}"
        raise InputError(f"must be a whole number {span}, not {shown(value)}", where=where)
    return found


def number(where: str, value: Any, span: str, fits: Callable[[float], bool]) -> float:
    """A number, numpy's too, that fits; `span` says which ones do."""
    found = math.nan
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            found = float(value)
        except OverflowError:
            found = math.inf
    if not math.isfinite(found) or not fits(found):
        raise InputError(f"must be a number {span}, not {shown(value)}", where=where)
    return found


def choice(where: str, value: Any, names: Sequence[str]) -> None:
    """One of some words."""
    if not isinstance(value, str) or value not in names:
        known = f"{', '.join(names[:-1])} or {names[-1]}"
        raise InputError(f"must be {known}, not {shown(value)}", where=where)


def flag(where: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise InputError(f"must be true or false, not {shown(value)}", where=where)


def text(where: str, value: Any) -> str:
    """A string that the native side neither cuts nor refuses."""
    if not isinstance(value, str):
        raise InputError(f"must be a string, not {shown(value)}", where=where)
    if "\0" in value:  # the native side would take it for the end
        raise InputError("holds a NUL character", where=where, fix="give text, not a binary file")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        what = f"is not Unicode ({error.reason} at {error.start})"
        raise InputError(what, where=where, fix="give UTF-8 text") from error
    return value


def items(where: str, value: Any, what: str) -> list[Any]:
    """What a list, or anything that gives one item after the other, holds; `what` says what it must be."""
    if not isinstance(value, str | bytes | bytearray | Mapping):
        try:
            return list(iter(value))
        except TypeError:
            pass
    raise InputError(f"must be {what}, not {shown(value)}", where=where)


def token_ids(where: str, value: Any, size: int) -> list[int]:
    """Token ids of a vocabulary of this size."""
    found = items(where, value, "a list of token ids")
    return [whole(f"{where}[{place}]", token, 0, size - 1) for place, token in enumerate(found)]


def event(where: str, value: Any) -> None:
    """None, or what can be asked whether it is set, as `threading.Event`."""
    if value is not None and not callable(getattr(value, "is_set", None)):
        raise InputError(f"must be a threading.Event, not {shown(value)}", where=where)


def function(where: str, value: Any) -> None:
    """None, or something that can be called."""
    if value is not None and not callable(value):
        raise InputError(f"must be a function, not {shown(value)}", where=where)


def closed() -> EdgetuneError:
    """The error of a session that is used after it was closed."""
    return EdgetuneError("the session is closed", fix="load the artifact again, or use it inside the `with` block")
