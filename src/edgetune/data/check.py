"""`edgetune data check`: everything that the data stage would find, without writing anything."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from edgetune.data.examine import Examined, examine, longest
from edgetune.data.parallel import Encoder
from edgetune.data.problems import Problem
from edgetune.data.render import Renderer
from edgetune.data.report import report
from edgetune.recipe import DataSection, ModelSection

if TYPE_CHECKING:
    from edgetune.models import Base


@dataclass(frozen=True)
class Checked:
    """What a check found.

    Attributes:
        problems: of which rows and files; the first 10,000.
        count: how many there are.
        report: as the data stage writes it; what could not be read is missing from its counts.
        example: one training row in pieces, each learned or only read.
    """

    problems: list[Problem]
    count: int
    report: dict[str, Any]
    example: list[tuple[str, bool]]

    def as_json(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return {
            "ok": not self.count,
            "problem_count": self.count,
            "problems": [asdict(problem) for problem in self.problems],
            "report": self.report,
            "example": [{"text": text, "learned": learned} for text, learned in self.example],
        }


def check(section: DataSection, *, seed: int, model: ModelSection | None, base: Base | None = None) -> Checked:
    """Check a recipe's data.

    Args:
        section: the data section; paths are absolute or relative to the working folder.
        seed: of the split.
        model: whose tokens and chat template are used; None leaves tokens out and counts characters.
        base: that model, where it is resolved already.

    Raises:
        InputError: the model cannot be used: not found, no chat template, a context below `max_length`.
    """
    renderer, context, stops = None, None, set[int]()
    if model is not None:
        from edgetune.models import context_length, load_tokenizer, resolve, stop_ids

        path = (base or resolve(model)).path
        tokenizer = load_tokenizer(path, trust_remote_code=model.trust_remote_code, chat_template=model.chat_template)
        context, stops = context_length(path), set(stop_ids(path))
        renderer = Renderer(tokenizer, stops)
    with ExitStack() as stack:
        encoder = None
        if renderer is not None:
            encoder = stack.enter_context(Encoder(renderer, section.train_on, longest(section, context)))
        examined = examine(section, seed=seed, encoder=encoder)
    return Checked(
        examined.problems.items,
        examined.problems.count,
        report(examined, section, seed, renderer, stops),
        _example(examined, section, renderer),
    )


def _example(examined: Examined, section: DataSection, renderer: Renderer | None) -> list[tuple[str, bool]]:
    values = examined.train.first()
    if values is None:
        return []
    if renderer is not None:
        return renderer.pieces(renderer.encode(values, section.train_on))
    if "text" in values:
        return [(values["text"], True)]
    turns = values["messages"]
    pieces: list[tuple[str, bool]] = []
    for number, turn in enumerate(turns, 1):
        learned = section.train_on == "all" or (
            turn["role"] == "assistant" and (section.train_on == "assistant" or number == len(turns))
        )
        pieces += [(f"{turn['role']}: ", False), (turn["content"], learned), ("\n", False)]
    return [("".join(text for text, _ in run), learned) for learned, run in groupby(pieces, key=lambda piece: piece[1])]
