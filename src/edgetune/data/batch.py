"""Prepared rows to encoded rows to arrays: what training, merging and verifying share."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.data.cache import EncodedRows, Writer, find, key, locked
from edgetune.data.fingerprint import fingerprint
from edgetune.data.parallel import Encoder
from edgetune.data.problems import RowProblem
from edgetune.data.render import Encoded, Renderer, TrainOn, cut
from edgetune.errors import InputError
from edgetune.files import HashCache
from edgetune.progress import task

if TYPE_CHECKING:
    import numpy as np

__all__ = ["IGNORED", "Encoded", "EncodedRows", "collate", "cut", "encode_file", "load", "sizes"]

IGNORED = -100  # the label that PyTorch's cross entropy leaves out
_AGAIN = "`edgetune run RECIPE --from data` prepares the rows again"


def load(path: Path) -> Iterator[dict[str, Any]]:
    """Read a prepared file: rows `{"messages": [...] or "text": "…", "where": "file:line"}`, one at a time.

    Raises:
        InputError: the file is missing or broken.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)
    except FileNotFoundError as error:
        raise InputError("no such file of prepared rows", where=path, fix=_AGAIN) from error
    except ValueError as error:
        raise InputError(f"not a whole file of prepared rows ({error})", where=path, fix=_AGAIN) from error


def encode_file(
    path: Path,
    renderer: Renderer,
    train_on: TrainOn,
    max_length: int,
    limit: int | None = None,
    workers: int | None = None,
) -> EncodedRows:
    """The encoded rows of a prepared file: those that are kept, or else encoded now and kept.

    Args:
        path: `train.jsonl` or `validation.jsonl`, as `prepare` writes them.
        renderer: of the tokenizer that the rows were prepared with.
        train_on: where the loss falls.
        max_length: tokens a row; longer rows are cut at the end, as `prepare` has decided and checked.
        limit: how many rows; all when None.
        workers: processes that encode; see `Encoder`.

    Raises:
        InputError: the file is missing or broken; a row that does not fit this tokenizer or its chat template, by name.
    """
    if not path.is_file():
        raise InputError("no such file of prepared rows", where=path, fix=_AGAIN)
    hashes = HashCache()
    name = key(hashes.file(path), fingerprint(renderer), train_on, max_length)
    hashes.save()
    with locked(name):
        rows = find(name)
        if rows is None:
            with Encoder(renderer, train_on, max_length, workers) as encoder, Writer(encoder.token_bytes) as writer:
                _encode(path, encoder, writer, limit)
                rows = writer.keep(name if limit is None else None)  # a part is no entry
    return rows[:limit]


def _encode(path: Path, encoder: Encoder, writer: Writer, limit: int | None) -> None:
    with path.open("rb") as file:
        count = sum(1 for _ in file)
    count = count if limit is None else min(count, limit)
    rows = ((row, row.get("where", path)) for _, row in zip(range(count), load(path), strict=False))
    with task(f"tokens of {path.name}", count) as shown:
        for where, found in encoder.encode(rows, count):
            if isinstance(found, RowProblem):
                raise InputError(found.what, where=where, fix=found.fix)
            writer.add(found)
            shown.advance()


def sizes(rows: Sequence[Encoded]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each row, and how many of them carry loss: two int64 arrays."""
    import numpy as np

    if isinstance(rows, EncodedRows):
        return rows.lengths, rows.learned_counts
    lengths = np.array([len(row.ids) for row in rows], dtype=np.int64)
    return lengths, np.array([int(sum(row.learned)) for row in rows], dtype=np.int64)


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
