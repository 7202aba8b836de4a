"""Prepared rows to encoded rows to arrays: what training, merging and verifying share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgetune.data.problems import RowProblem
from edgetune.data.render import Encoded, Renderer, TrainOn, cut
from edgetune.errors import InputError
from edgetune.progress import task

__all__ = ["IGNORED", "Encoded", "collate", "cut", "encode_file", "load"]

IGNORED = -100  # the label that PyTorch's cross entropy leaves out


def load(path: Path) -> list[dict[str, Any]]:
    """Read a prepared file: rows `{"messages": [...] or "text": "…", "where": "file:line"}`.

    Raises:
        InputError: the file is missing or broken.
    """
    again = "`edgetune run RECIPE --from data` prepares the rows again"
    try:
        with path.open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]
    except FileNotFoundError as error:
        raise InputError("no such file of prepared rows", where=path, fix=again) from error
    except ValueError as error:
        raise InputError(f"not a whole file of prepared rows ({error})", where=path, fix=again) from error


def encode_file(
    path: Path, renderer: Renderer, train_on: TrainOn, max_length: int, limit: int | None = None
) -> list[Encoded]:
    """Encode a prepared file.

    Args:
        path: `train.jsonl` or `validation.jsonl`, as `prepare` writes them.
        renderer: of the tokenizer that the rows were prepared with.
        train_on: where the loss falls.
        max_length: tokens a row; longer rows are cut at the end, as `prepare` has decided and checked.
        limit: how many rows; all when None.

    Raises:
        InputError: a row that does not fit this tokenizer or its chat template, by name.
    """
    rows, encoded = load(path)[:limit], []
    with task(f"tokens of {path.name}", len(rows)) as shown:
        for row in rows:
            try:
                encoded.append(cut(renderer.encode(row, train_on), max_length))
            except RowProblem as problem:
                raise InputError(problem.what, where=row.get("where", path), fix=problem.fix) from problem
            shown.advance()
    return encoded


def collate(batch: Sequence[Encoded], pad_id: int) -> dict[str, Any]:
    """Rows to one batch, padded on the right to the longest.

    Args:
        batch: B rows.
        pad_id: the token for padding; it is masked and never learned.

    Returns:
        numpy int64 arrays of shape (B, S): `input_ids`; `attention_mask`, 1 on the row's tokens; `labels`,
        the row's tokens where they are learned and -100 elsewhere, not shifted.
    """
    import numpy as np

    shape = (len(batch), max(len(row.ids) for row in batch))
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    for i, row in enumerate(batch):
        length = len(row.ids)
        input_ids[i, :length] = row.ids
        attention_mask[i, :length] = 1
        labels[i, :length] = np.where(row.learned, row.ids, IGNORED)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
