"""The data stage: files of examples to checked, normalized rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.data.examine import Example, examine
from edgetune.data.render import Renderer
from edgetune.data.report import report
from edgetune.files import write_json, write_text
from edgetune.progress import say
from edgetune.recipe import DataSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prepared:
    """What the data stage wrote.

    Attributes:
        train, validation: JSON Lines of `{"messages" or "text": …, "where": "file:line"}`.
        report: what `report.json` says; see `edgetune.data.report`.
    """

    train: Path
    validation: Path
    report: dict[str, Any]


def prepare(
    section: DataSection,
    *,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    stop_ids: set[int],
    out: Path,
) -> Prepared:
    """Read, check, normalize and split the examples; write train.jsonl, validation.jsonl and report.json.

    Args:
        section: the recipe's data section.
        seed: of the split.
        tokenizer: the base model's, with its chat template.
        context: the model's context in tokens.
        stop_ids: the tokens at which the model's generation stops.
        out: an existing folder, which the caller puts into place when all is well.

    Raises:
        InputError: all that is wrong with the rows, up to 20 shown; nothing is written then.
    """
    renderer = Renderer(tokenizer, stop_ids)
    examined = examine(section, seed=seed, renderer=renderer, context=context)
    examined.problems.raise_any()
    said = report(examined, section, seed, renderer, stop_ids)
    for warning in said["warnings"]:
        say(f"warning: {warning}")
    prepared = Prepared(out / "train.jsonl", out / "validation.jsonl", said)
    _write(prepared.train, examined.train)
    _write(prepared.validation, examined.validation)
    write_json(out / "report.json", said)
    return prepared


def _write(path: Path, rows: Sequence[Example]) -> None:
    lines = (json.dumps({**row.values, "where": row.where}, ensure_ascii=False) for row in rows)
    write_text(path, "".join(f"{line}\n" for line in lines))
