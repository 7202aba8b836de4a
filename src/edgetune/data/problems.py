"""What is wrong with a data file, row by row: all of it at once, not the first thing only."""

from __future__ import annotations

from dataclasses import dataclass, field

from edgetune.errors import InputError

_SHOWN = 20
_KEPT = 10_000


class RowProblem(Exception):
    """One row cannot be used. Whoever knows the row's place adds it.

    Args:
        what: what is wrong with the row.
        fix: what to do about it.
    """

    def __init__(self, what: str, fix: str) -> None:
        self.what, self.fix = what, fix
        super().__init__(what)

    def __reduce__(self) -> tuple[type[RowProblem], tuple[str, str]]:
        return type(self), (self.what, self.fix)  # so that it can come from another process


@dataclass(frozen=True)
class Problem:
    """A place (`file:line`, or a file), what is wrong there and what to do."""

    where: str
    what: str
    fix: str

    def line(self) -> str:
        """All of it on one line."""
        return f"{self.where}: {self.what}; {self.fix}"


@dataclass
class Problems:
    """The problems of a set of files, in the order in which they were found."""

    items: list[Problem] = field(default_factory=list)
    count: int = 0

    def add(self, where: object, what: str, fix: str) -> None:
        """Note a problem. Beyond the first 10,000 they are counted only."""
        self.count += 1
        if len(self.items) < _KEPT:
            self.items.append(Problem(str(where), what, fix))

    def extend(self, other: Problems) -> None:
        """Note all problems of `other` after these."""
        self.count += other.count
        self.items += other.items[: _KEPT - len(self.items)]

    def sort(self) -> None:
        """Bring them into the files' own order; they are found in several passes."""
        files = {name: i for i, name in enumerate(dict.fromkeys(_place(p)[0] for p in self.items))}
        self.items.sort(key=lambda problem: (files[_place(problem)[0]], _place(problem)[1]))

    def raise_any(self) -> None:
        """Raise one InputError that shows the first 20 problems and counts the rest, if there are any."""
        if self.count == 1:
            only = self.items[0]
            raise InputError(only.what, where=only.where, fix=only.fix)
        if self.count:
            shown = [f"{p.where}: {p.what}\n  fix: {p.fix}" for p in self.items[:_SHOWN]]
            if self.count > _SHOWN:
                shown.append(f"and {self.count - _SHOWN:,} more problems; `edgetune data check` shows them all")
            raise InputError(f"{self.count:,} problems in the data\n" + "\n".join(shown))


def _place(problem: Problem) -> tuple[str, int]:
    name, _, at = problem.where.rpartition(":")
    number = at.removeprefix("row ")
    return (name, int(number)) if name and number.isdecimal() else (problem.where, 0)


def quoted(text: str, width: int = 60) -> str:
    """A piece of someone's data for a message: one line, control characters escaped, cut to `width`."""
    return repr(text if len(text) <= width else text[: width - 1] + "…")


def kind(value: object) -> str:
    """What a JSON value is, as people say it."""
    names = {type(None): "null", bool: "true or false", str: "a string", dict: "an object", list: "a list"}
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "a number"
    return names.get(type(value), f"a {type(value).__name__}")
