"""The model that is healed: first it tells as the teacher what it thinks of each row, then it is quantized and learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgetune import progress
from edgetune.data.batch import IGNORED, Encoded
from edgetune.errors import InputError
from edgetune.export.quantize.grid import Quantized
from edgetune.export.quantize.heal_layers import GridLinear, Matrix, Place, install
from edgetune.export.quantize.heal_loss import Heads, divergence, score
from edgetune.models import load_model
from edgetune.recipe import TrainSection
from edgetune.train import attention, memory
from edgetune.train.method import base_dtype
from edgetune.train.objective import Objective
from edgetune.train.schedule import passes

_PASS_TOKENS = 2048


class Student:
    """A merged model, its rows, and what it learns.

    Args:
        folder: merged transformers folder. It computes in bfloat16 where the processor multiplies that natively.
        rows: all rows; `learned` says whose predictions are compared.

    Attributes:
        matrices: what learns, by full module name; empty until `become`.
    """

    def __init__(self, folder: Path, rows: Sequence[Encoded], *, trust_remote_code: bool) -> None:
        memory.bound_kept_code()
        dtype = base_dtype(TrainSection())
        self.model = load_model(folder, dtype=dtype, trust_remote_code=trust_remote_code).eval().requires_grad_(False)
        if torch.cuda.is_available():
            self.model.to("cuda")
        config = self.model.config.get_text_config()
        pad = getattr(config, "pad_token_id", None)
        self._objective = Objective(
            self.model, pad if isinstance(pad, int) and pad >= 0 else 0, attention.use(self.model)
        )
        self._objective.prove(self.model, rows)
        self.rows = list(rows)
        self._lengths = np.array([len(row.ids) for row in rows])
        self._said: dict[int, torch.Tensor] = {}
        self._where = Place()
        self.matrices: dict[str, Matrix] = {}
        head = self.model.get_output_embeddings()
        if head is None:
            raise InputError("the model has no head that is known", where=folder, fix="leave export.heal off")
        self._heads = Heads(head.weight, head.weight, head.bias)
        self._check_head(folder)

    def add(self, rows: Sequence[Encoded]) -> list[int]:
        """Take further rows; returns their numbers."""
        first = len(self.rows)
        self.rows += rows
        self._lengths = np.array([len(row.ids) for row in self.rows])
        return list(range(first, len(self.rows)))

    def _check_head(self, folder: Path) -> None:
        """Some models do more than a product to make logits."""
        batch = self._batch([int(self._lengths.argmin())])
        with torch.no_grad():
            wanted = self.model(**self._inputs(batch), use_cache=False).logits[0]
            hidden = self.model.base_model(**self._inputs(batch), use_cache=False).last_hidden_state[0]
        if not torch.allclose(self._heads.logits(hidden, self._heads.teacher), wanted.float(), atol=0.1, rtol=0.02):
            raise InputError(
                f"the logits of {type(self.model).__name__} are more than its head's product",
                where=folder,
                fix="leave export.heal off for this model",
            )

    def listen(self, numbers: Sequence[int]) -> None:
        """Note what the teacher thinks: its last hidden states at the compared positions of these rows."""
        with progress.task("teacher", len(numbers)) as bar, torch.no_grad():
            for some in passes(numbers, self._lengths, _PASS_TOKENS):
                hidden = self._hidden(self._batch(some))
                counts = [sum(self.rows[i].learned[1:]) for i in some]
                for i, part in zip(some, hidden.split(counts), strict=True):
                    self._said[i] = part.clone()
                bar.advance(len(some))

    def become(self, found: dict[str, Quantized], floats: Mapping[str, torch.Tensor], rank: int, seed: int) -> None:
        """Quantize the model: from here on it is the student."""
        teacher = self._heads.teacher.data.clone()
        for name, value in floats.items():
            self.model.get_parameter(name).data.copy_(value)
        self.matrices = install(self.model, found, rank, seed, self._where)
        head = self.model.get_output_embeddings()
        self._heads = Heads(teacher, head.weight.data, self._heads.bias, self.matrices.get("lm_head"))
        self._linears = [module for module in self.model.modules() if isinstance(module, GridLinear)]

    def groups(self, rate: float, rank_rate: float) -> list[dict[str, Any]]:
        """What learns, for an optimizer."""
        matrices = self.matrices.values()
        found = [{"params": [matrix.stretch for matrix in matrices], "lr": rate}]
        low = [one for matrix in matrices for one in matrix.learns()[1:]]
        return [*found, {"params": low, "lr": rank_rate}] if low else found

    def step(self, numbers: Sequence[int]) -> float:
        """Gradients of the mean divergence over a step's rows, and the divergence."""
        total, count = 0.0, sum(len(self._said[i]) for i in numbers)
        for some in passes(numbers, self._lengths, _PASS_TOKENS):
            hidden = self._hidden(self._batch(some))
            loss = divergence(hidden, torch.cat([self._said[i] for i in some]), self._heads) / count
            loss.backward()
            total += loss.item()
        return total

    def score(self, numbers: Sequence[int]) -> tuple[float, float]:
        """Mean divergence in nats, and top-1 agreement, over some rows."""
        total, same, count = 0.0, 0, 0
        with torch.no_grad():
            for some in passes(numbers, self._lengths, _PASS_TOKENS):
                teacher = torch.cat([self._said[i] for i in some])
                found = score(self._hidden(self._batch(some)), teacher, self._heads)
                total, same, count = total + found[0], same + found[1], count + len(teacher)
        return total / count, same / count

    def refresh(self) -> None:
        """Make all weights anew from what was learned."""
        for linear in self._linears:
            linear.refresh()
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        for name, module in (("lm_head", head), ("model.embed_tokens", embedding)):
            if name in self.matrices:
                self.matrices[name].write(module.weight.data)

    def learned(self) -> dict[str, torch.Tensor]:
        """All that learns, by name; not copies."""
        return {
            f"{name}.{own}": value.detach()
            for name, matrix in self.matrices.items()
            for own, value in matrix.named_parameters()
        }

    def load(self, learned: Mapping[str, torch.Tensor]) -> None:
        """Take what `learned` gave."""
        for name, value in self.learned().items():
            value.copy_(learned[name])
        self.refresh()

    def _batch(self, numbers: Sequence[int]) -> dict[str, Any]:
        device = self.model.device
        made = self._objective.batch([self.rows[i] for i in numbers])
        return {name: value.to(device) if torch.is_tensor(value) else value for name, value in made.items()}

    def _inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        if "row_lengths" not in batch:
            return {name: batch[name] for name in ("input_ids", "attention_mask")}
        nothing = torch.empty(1, 1, 1, 1, device=batch["input_ids"].device)  # see Objective: no mask is needed
        return {name: batch[name] for name in ("input_ids", "position_ids", "row_lengths")} | {
            "attention_mask": nothing
        }

    def _hidden(self, batch: dict[str, Any]) -> torch.Tensor:
        """Last hidden states (N, hidden) at the compared positions, row after row."""
        self._where.set(batch.get("row_lengths"))
        out = self.model.base_model(**self._inputs(batch), use_cache=False).last_hidden_state
        return out[:, batch["places"]][batch["targets"] != IGNORED]
