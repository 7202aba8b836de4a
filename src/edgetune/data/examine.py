"""The data stage without its last step: read, check, normalize, encode, split. No row stays in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.data.problems import Problems, RowProblem
from edgetune.data.read import names
from edgetune.data.render import Encoded, Renderer, TrainOn, cut
from edgetune.data.source import Kept, Normal, Side, Source, key
from edgetune.data.split import overlap, split
from edgetune.errors import InputError
from edgetune.progress import task
from edgetune.recipe import AutoValidation, DataSection

if TYPE_CHECKING:
    from edgetune.data.cache import Writer
    from edgetune.data.parallel import Encoder, Tokens

_STEP = 64  # rows between two updates of the progress


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

    train: Side
    validation: Side
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


def examine(
    section: DataSection,
    *,
    seed: int,
    encoder: Encoder | None,
    spools: Mapping[str, Writer] | None = None,
) -> Examined:
    """Go through all rows.

    Args:
        section: the recipe's data section.
        seed: of the split.
        encoder: for this section's `train_on` and the limit that `longest` gives; None checks everything but tokens.
        spools: `train` and `validation`: where the tokens of the usable rows of these files go, in their order.

    Returns:
        the rows and the problems; problems are collected, not raised.

    Raises:
        InputError: no row can be learned with the chat template; a file changed while it was read.
    """
    import numpy as np

    limit = encoder.limit if encoder else None
    counts, problems = Counts(), Problems()
    files, held, given = train_files(section), validation_files(section), section.validation
    named = list(zip([*files, *held], names([*files, *held]), strict=True))
    sources = {"train": Source(named[: len(files)])}
    if held:
        sources["validation"] = Source(named[len(files) :])
    for side, source in sources.items():
        source.survey(side, section.form, problems)
        for name, read in source.read.items():
            counts.rows[name] = counts.rows.get(name, 0) + read
        counts.forms |= {side: source.form} if source.form else {}
    if len({form == "text" for form in counts.forms.values()}) > 1:
        fix = "use the same kind of rows on both sides"
        problems.add(str(given), "training and validation rows differ: one is plain text, one is chat", fix)
    stage = _Stage(section, encoder, counts, problems)
    kept = {side: stage.kept(side, source, (spools or {}).get(side)) for side, source in sources.items()}
    rows = kept["train"]
    if isinstance(given, AutoValidation):
        held_out = np.array(_held_out(rows, given.auto, seed, problems), bool)
        train = Side.of(sources["train"], rows, ~held_out)
        validation = Side.of(sources["train"], rows, held_out)
    else:
        validation = Side.of(sources["validation"], kept["validation"], np.ones(len(kept["validation"]), bool))
        shared = np.array(overlap(rows.arrays()["keys"], validation.keys), bool)
        counts.overlap = int(shared.sum())
        train = Side.of(sources["train"], rows, ~shared)
    if not problems.count:
        _nothing_left(train, validation, counts, problems)
    problems.sort()
    return Examined(train, validation, counts, problems, limit)


def encode_any(
    path: Path, renderer: Renderer, train_on: TrainOn, limit: int, rows: int, side: str = "held-out"
) -> list[Encoded]:
    """Encode the first `rows` rows of a file, in whichever form it is; what is over `limit` tokens is cut. `side` is what
    they are called while they are read.

    Raises:
        InputError: all that is wrong with the rows.
    """
    problems, found = Problems(), list[Encoded]()
    section = DataSection(train=str(path), train_on=train_on, too_long="truncate")
    source = Source([(path, path.name)])
    source.survey(side, section.form, problems)
    for number, row in enumerate(source.normalized(problems=problems)):
        if number >= rows:  # the others are only checked
            continue
        try:
            encoded = renderer.encode(row.values, train_on)
            short = cut(encoded, limit)
            if not sum(short.learned) and len(encoded.ids) > limit:
                raise RowProblem(
                    f"the row has {len(encoded.ids):,} tokens and nothing learned in the {limit:,} that the model can read",
                    "shorten it, or leave it out",
                )
            found.append(short)
        except RowProblem as problem:
            problems.add(row.where, problem.what, problem.fix)
    problems.sort()
    problems.raise_any()
    return found


def longest(section: DataSection, context: int | None) -> int | None:
    """Tokens a row may have. Raises InputError when `max_length` exceeds the model's context."""
    if context is not None and section.max_length is not None and section.max_length > context:
        raise InputError(
            f"max_length is {section.max_length:,} tokens, the model's context is {context:,}",
            where="data.max_length",
            fix=f"set it to {context} or less, or take another model",
        )
    return section.max_length or context


@dataclass
class _Stage:
    """Normalizes and encodes the rows of a source, one after the other."""

    section: DataSection
    encoder: Encoder | None
    counts: Counts
    problems: Problems

    def kept(self, side: str, source: Source, spool: Writer | None) -> Kept:
        """The rows that can be used; what is wrong with the others is noted."""
        kept = Kept()
        rows = source.normalized(self.counts.extra_keys, self.problems)
        if self.encoder is None:
            for row in rows:
                kept.add(row.number, key(row.values), *_characters(row.values))
        elif source.form is not None:
            limit, before = self.encoder.limit, 0
            with task(f"{side} tokens", source.count) as shown:
                for row, found in self.encoder.encode(((row.values, row) for row in rows), source.count):
                    try:
                        self._add(kept, row, found, limit, spool)
                    except RowProblem as problem:
                        self.problems.add(row.where, problem.what, problem.fix)
                    if row.number - before >= _STEP:
                        shown.advance(row.number - before)
                        before = row.number
                shown.advance(source.count - before)
        return kept

    def _add(
        self, kept: Kept, row: Normal, found: Tokens | RowProblem, limit: int | None, spool: Writer | None
    ) -> None:
        if isinstance(found, RowProblem):
            raise found
        self.counts.notes.update(found.notes)
        if limit is not None and found.whole > limit:
            self.counts.too_long += 1
            _too_long(self.section, found.whole, found.learned_count, limit)
            if self.section.too_long == "drop":
                return
        kept.add(row.number, key(row.values), found.whole, found.learned_count)
        if spool is not None:
            spool.add(found)


def _characters(values: dict[str, Any]) -> tuple[int, int]:
    if "text" in values:
        return len(values["text"]), len(values["text"])
    lengths = [(turn["role"], len(turn["content"])) for turn in values["messages"]]
    return sum(n for _, n in lengths), sum(n for role, n in lengths if role == "assistant")


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


def _held_out(rows: Kept, share: float, seed: int, problems: Problems) -> list[bool]:
    nothing = [False] * len(rows)
    if not len(rows):
        return nothing
    try:
        return split(rows.arrays()["keys"], share, seed)
    except InputError as error:
        if not problems.count:  # rows that are missing because they are wrong have been named already
            problems.add(error.where, error.what, error.fix or "")
        return nothing


def _nothing_left(train: Side, validation: Side, counts: Counts, problems: Problems) -> None:
    for side, rows in (("train", train), ("validation", validation)):
        if len(rows):
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


def outlets(sides: Mapping[Path, Side]) -> Iterator[tuple[Path, Normal]]:
    """The rows of the sides, each source read once: the path of the row's side, and the row."""
    import numpy as np

    for source in {id(side.source): side.source for side in sides.values()}.values():
        mine = [(path, side) for path, side in sides.items() if side.source is source]
        goes = np.full(source.count, -1, np.int8)
        for number, (_, side) in enumerate(mine):
            goes[side.numbers] = number
        for row in source.normalized():
            if goes[row.number] >= 0:
                yield mine[goes[row.number]][0], row
