"""The data stage: files of examples to checked, normalized rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.data.cache import Writer, keep, key, possible
from edgetune.data.examine import examine, longest, outlets
from edgetune.data.fingerprint import fingerprint
from edgetune.data.parallel import Encoder
from edgetune.data.render import Renderer
from edgetune.data.report import report
from edgetune.data.source import Side
from edgetune.files import write_json
from edgetune.progress import say, task
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
    workers: int | None = None,
) -> Prepared:
    """Read, check, normalize and split the examples; write train.jsonl, validation.jsonl and report.json.

    No row stays in memory. What was encoded on the way is kept for `encode_file` (see `edgetune.data.cache`).

    Args:
        section: the recipe's data section.
        seed: of the split.
        tokenizer: the base model's, with its chat template.
        context: the model's context in tokens.
        stop_ids: the tokens at which the model's generation stops.
        out: an existing folder, which the caller puts into place when all is well.
        workers: processes that encode; see `Encoder`.

    Raises:
        InputError: all that is wrong with the rows, up to 20 shown; nothing is written then.
    """
    renderer = Renderer(tokenizer, stop_ids)
    limit, known = longest(section, context), fingerprint(renderer)
    with ExitStack() as spools:
        with Encoder(renderer, section.train_on, limit, workers) as encoder:
            kept = ("train", "validation") if possible(known) else ()
            spool = {side: spools.enter_context(Writer(encoder.token_bytes)) for side in kept}
            examined = examine(section, seed=seed, encoder=encoder, spools=spool)
        examined.problems.raise_any()
        said = report(examined, section, seed, renderer, stop_ids)
        for warning in said["warnings"]:
            say(f"warning: {warning}")
        prepared = Prepared(out / "train.jsonl", out / "validation.jsonl", said)
        sides = {prepared.train: examined.train, prepared.validation: examined.validation}
        hashes = _write(sides)
        write_json(out / "report.json", said)
        for path, side in sides.items() if kept else ():
            encoded = spool["train" if side.source is examined.train.source else "validation"]
            keep(key(hashes[path], known, section.train_on, limit), encoded, side.chosen)
    return prepared


def _write(sides: Mapping[Path, Side]) -> dict[Path, str]:
    """Write each side's rows into its file; returns the files' SHA-256."""
    hashes = {path: hashlib.sha256() for path in sides}
    with ExitStack() as files, task("prepared rows", sum(map(len, sides.values()))) as shown:
        opened = {path: files.enter_context(path.open("wb")) for path in sides}
        for path, row in outlets(sides):
            line = json.dumps({**row.values, "where": row.where}, ensure_ascii=False) + "\n"
            data = line.encode("utf-8")
            opened[path].write(data)
            hashes[path].update(data)
            shown.advance()
    return {path: found.hexdigest() for path, found in hashes.items()}
