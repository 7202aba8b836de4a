"""Rows that the model writes itself: they begin as the training rows do, and go on as the model would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from edgetune.data.batch import Encoded
from edgetune.export.quantize import heal_samples
from edgetune.export.quantize.heal_samples import own_rows
from edgetune.models import load_model
from edgetune.train import attention
from edgetune.train.samples import prompt_of


def _rows() -> list[Encoded]:
    lengths = [(7, 20), (12, 30), (3, 9), (40, 60)]
    return [
        Encoded([5 + (n * k) % 300 for k in range(e)], [k >= s for k in range(e)]) for n, (s, e) in enumerate(lengths)
    ]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    found = load_model(tiny_model, dtype=torch.float32).eval()
    assert attention.use(found)  # as the student has it
    return found


def test_rows_begin_as_those_of_the_training_and_are_learned_from_there(model: Any) -> None:
    found = own_rows(model, _rows(), 6, {2}, seed=3)
    prompts = [prompt.ids for row in _rows() if (prompt := prompt_of(row))]
    assert len(found) == 6
    for row in found:
        start = list(row.learned).index(True)
        assert list(row.ids[:start]) in prompts and all(row.learned[start:])
        assert 2 not in row.ids[start:-1]
        assert row.ids[-1] == 2 or len(row.ids) - start == heal_samples._LONGEST
    assert [row.ids for row in own_rows(model, _rows(), 6, {2}, seed=3)] == [row.ids for row in found]
    assert [row.ids for row in own_rows(model, _rows(), 6, {2}, seed=4)] != [row.ids for row in found]


def test_prompts_of_other_lengths_in_a_batch_change_nothing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heal_samples.torch, "multinomial", lambda shares, *_, **__: shares.argmax(-1, keepdim=True))
    monkeypatch.setattr(heal_samples, "_LONGEST", 12)
    together = {tuple(row.ids) for row in own_rows(model, _rows(), 4, set(), seed=1)}
    alone = {tuple(row.ids) for one in _rows() for row in own_rows(model, [one], 1, set(), seed=1)}
    assert together == alone and len(alone) == 4


def test_plain_text_gives_its_beginning(model: Any) -> None:
    row = Encoded(list(range(5, 95)), [False, *[True] * 89])
    (found,) = own_rows(model, [row], 1, set(), seed=1)
    assert list(found.ids[:32]) == list(row.ids[:32]) and list(found.learned).index(True) == 32


def test_rows_without_loss_have_no_prompt(model: Any) -> None:
    assert own_rows(model, [Encoded([5, 6, 7], [False] * 3)], 4, set(), seed=1) == []
