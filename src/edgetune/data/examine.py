"""The data stage without its last step: read, check, normalize, encode, split. Nothing is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgetune.data.forms import find_form, normalize
from edgetune.data.problems import Problems, RowProblem
from edgetune.data.read import Row, names, read
from edgetune.data.render import Encoded, Renderer, TrainOn, cut
from edgetune.data.split import overlap, split
from edgetune.errors import InputError
from edgetune.files import digest
from edgetune.progress import task
from edgetune.recipe import AutoValidation, DataSection

_STEP = 64  # rows between two updates of the progress


@dataclass(frozen=True)
class Example:
    """A row that can be used: normalized, with its place and, where there is a tokenizer, its length.

    `tokens` is the length before a cut; without a tokenizer, `tokens` and `learned` count characters.
    """

    values: dict[str, Any]
    where: str
    key: str
    tokens: int = 0
    learned: int = 0


@dataclass
class Counts:
    """What was met on the way."""

    rows: dict[str, int] = field(default_factory=dict)
    """File → rows read."""
    forms: dict[str, str] = field(default_factory=dict)
    """Side (`train`, `validation`) → form."""
    extra_keys: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    too_long: int = 0
    overlap: int = 0


@dataclass
class Examined:
    """The rows of both sides, and all that is wrong with the files."""

    train: list[Example]
    validation: list[Example]
    counts: Counts
    problems: Problems
    limit: int | None
    """Tokens a row; None without a tokenizer."""


def train_files(section: DataSection) -> list[Path]:
    """The recipe's training files."""
    files = section.train if isinstance(section.train, list) else [section.train]
    return [Path(file) for file in files]


def validation_files(section: DataSection) -> list[Path]:
    """The recipe's validation file, if it names one."""
    return [Path(section.validation)] if isinstance(section.validation, str) else []


def examine(section: DataSection, *, seed: int, renderer: Renderer | None, context: int | None) -> Examined:
    """Go through all rows.

    Args:
        section: the recipe's data section.
        seed: of the split.
        renderer: None checks everything but tokens.
        context: the model's context in tokens, the limit when `max_length` is not given.

    Returns:
        the rows and the problems; problems are collected, not raised.

    Raises:
        InputError: `max_length` exceeds the context; the chat template cannot be learned with.
    """
    limit = _limit(section, context) if renderer is not None else None
    counts, problems = Counts(), Problems()
    files, held, given = train_files(section), validation_files(section), section.validation
    called = dict(zip([*files, *held], names([*files, *held]), strict=True))
    train = _side("train", files, called, section, counts, problems)
    validation: list[Example] = []
    if held:
        validation = _side("validation", held, called, section, counts, problems)
        if len({form == "text" for form in counts.forms.values()}) > 1:
            fix = "use the same kind of rows on both sides"
            problems.add(str(given), "training and validation rows differ: one is plain text, one is chat", fix)
    if renderer is not None:
        train = _measured("train", train, section, renderer, limit, counts, problems)
        validation = _measured("validation", validation, section, renderer, limit, counts, problems)
    if isinstance(given, AutoValidation):
        if train:
            train, validation = _held_out(train, given.auto, seed, problems)
    else:
        shared = overlap([row.key for row in train], [row.key for row in validation])
        counts.overlap = sum(shared)
        train = [row for row, drop in zip(train, shared, strict=True) if not drop]
    if not problems.count:
        _nothing_left(train, validation, section, counts, problems)
    problems.sort()
    return Examined(train, validation, counts, problems, limit)


def encode_any(path: Path, renderer: Renderer, train_on: TrainOn, limit: int, rows: int) -> list[Encoded]:
    """Encode the first `rows` rows of a file, in whichever form it is; what is over `limit` tokens is cut.

    Raises:
        InputError: all that is wrong with the rows.
    """
    counts, problems = Counts(), Problems()
    section = DataSection(train=str(path), train_on=train_on, too_long="truncate")
    found = _side("held-out", [path], {path: path.name}, section, counts, problems)[:rows]
    found = _measured("held-out", found, section, renderer, limit, counts, problems)
    problems.raise_any()
    return [cut(renderer.encode(row.values, train_on), limit) for row in found]


def _limit(section: DataSection, context: int | None) -> int | None:
    if context is not None and section.max_length is not None and section.max_length > context:
        raise InputError(
            f"max_length is {section.max_length:,} tokens, the model's context is {context:,}",
            where="data.max_length",
            fix=f"set it to {context} or less, or take another model",
        )
    return section.max_length or context


def _side(
    side: str,
    files: list[Path],
    called: dict[Path, str],
    section: DataSection,
    counts: Counts,
    problems: Problems,
) -> list[Example]:
    rows: list[Row] = []
    with task(f"{side} rows") as shown:
        for path in files:
            name = called[path]
            before = len(rows)
            rows.extend(read(path, problems, name))
            counts.rows[name] = counts.rows.get(name, 0) + len(rows) - before
            shown.advance(note=f"{len(rows):,} rows")
        form = None if not rows else find_form(rows, problems) if section.form == "auto" else section.form
        if form is None:
            return []
        counts.forms[side] = form
        return list(_normalized(rows, form, counts, problems))


def _normalized(rows: list[Row], form: str, counts: Counts, problems: Problems) -> Iterator[Example]:
    for row in rows:
        try:
            values = normalize(row.values, form, counts.extra_keys)
        except RowProblem as problem:
            problems.add(row.where, problem.what, problem.fix)
            continue
        whole, learned = _characters(values)
        yield Example(values, row.where, digest(values), whole, learned)


def _characters(values: dict[str, Any]) -> tuple[int, int]:
    if "text" in values:
        return len(values["text"]), len(values["text"])
    lengths = [(turn["role"], len(turn["content"])) for turn in values["messages"]]
    return sum(n for _, n in lengths), sum(n for role, n in lengths if role == "assistant")


def _measured(
    side: str,
    rows: list[Example],
    section: DataSection,
    renderer: Renderer,
    limit: int | None,
    counts: Counts,
    problems: Problems,
) -> list[Example]:
    """Encode each row; what cannot be is a problem, what is over the limit is treated as the recipe says."""
    kept: list[Example] = []
    if not rows:
        return kept
    with task(f"{side} tokens", len(rows)) as shown:
        for number, row in enumerate(rows, 1):
            try:
                encoded = renderer.encode(row.values, section.train_on)
                tokens, learned = len(encoded.ids), sum(encoded.learned)
                counts.notes.update(encoded.notes)
                if limit is not None and tokens > limit:
                    counts.too_long += 1
                    learned = sum(encoded.learned[:limit])
                    _too_long(section, tokens, learned, limit)
                if limit is None or tokens <= limit or section.too_long != "drop":
                    kept.append(replace(row, tokens=tokens, learned=learned))
            except RowProblem as problem:
                problems.add(row.where, problem.what, problem.fix)
            if number % _STEP == 0 or number == len(rows):
                shown.advance(number % _STEP or _STEP)
    return kept


def _too_long(section: DataSection, tokens: int, learned: int, limit: int) -> None:
    if section.too_long == "error":
        own, more = ("", "raise data.max_length, ") if section.max_length else (", the model's context", "")
        raise RowProblem(
            f"the row has {tokens:,} tokens, the limit is {limit:,}{own}",
            f"shorten it, {more}or set data.too_long=truncate or drop",
        )
    if section.too_long == "truncate" and not learned:
        raise RowProblem(
            f"the row has {tokens:,} tokens and nothing to learn in the {limit:,} that stay",
            "shorten it, raise data.max_length, or set data.too_long=drop",
        )


def _held_out(rows: list[Example], share: float, seed: int, problems: Problems) -> tuple[list[Example], list[Example]]:
    try:
        held_out = split([row.key for row in rows], share, seed)
    except InputError as error:
        if not problems.count:  # rows that are missing because they are wrong have been named already
            problems.add(error.where, error.what, error.fix or "")
        return rows, []
    return [r for r, held in zip(rows, held_out, strict=True) if not held], [
        r for r, held in zip(rows, held_out, strict=True) if held
    ]


def _nothing_left(
    train: list[Example], validation: list[Example], section: DataSection, counts: Counts, problems: Problems
) -> None:
    for side, rows in (("train", train), ("validation", validation)):
        if rows:
            continue
        if counts.overlap and side == "train":
            what, fix = (
                "every training row is also a validation row",
                "name another validation file, or `auto: 0.1`",
            )
        else:
            what, fix = (
                "every row is over the limit and was dropped",
                "raise data.max_length, or truncate the rows",
            )
        problems.add(f"data.{side}", what, fix)
