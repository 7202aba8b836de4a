"""What a forward pass learns: rows to tensors to a loss, by the fast way where it is proved right for the model."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgetune.data.batch import IGNORED, Encoded, collate
from edgetune.train import fused, shards
from edgetune.train.loss import LossHead, install
from edgetune.train.schedule import filled

if TYPE_CHECKING:
    from edgetune.train.distill import Taught

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2}  # nats a token, of the mean loss
_PROVED = 300  # tokens of a row: more than attention takes in one block


class Objective:
    """The loss of a causal language model over the tokens that carry loss.

    Args:
        model: in training or evaluation; its head is made to compute losses where it is plain.
        pad_id: token that fills up a padded pass.
        packed: rows of a pass lie one behind the other; the model must have been loaded with `attention.NAME`.
        smoothing: label smoothing, in training only.
        compute: dtype of the products of a model whose weights are wider (torch's autocast); its own when None.

    Attributes:
        head: what computes losses; None where the model's head is not plain.
        taught: how each pass is compared with the same model unrounded; None without distillation.
    """

    def __init__(
        self, model: Any, pad_id: int, packed: bool, smoothing: float = 0.0, compute: torch.dtype | None = None
    ) -> None:
        self.pad_id, self.packed, self.smoothing = pad_id, packed, smoothing
        self.compute = None if compute is torch.float32 else compute
        self.head: LossHead | None = install(model, smoothing)
        self.taught: Taught | None = None
        fused.install(model)

    def prove(self, model: Any, rows: Sequence[Encoded]) -> list[str]:
        """Compare with plain padded passes and whole logits; give up what does not agree.

        Args:
            model: the model.
            rows: the first two with something to learn are taken, up to 300 tokens of each.

        Returns:
            what was given up, in words; empty when all holds.
        """
        usable = (Encoded(row.ids[:_PROVED], row.learned[:_PROVED]) for row in rows if any(row.learned[1:_PROVED]))
        some = list(itertools.islice(usable, 2))
        if not some:
            return []
        fast = (self.packed, self.head)
        said = []
        self.packed, self.head = False, None
        wanted = self._mean(model, some)
        for name, packed, head in (("computing the loss in the head", False, fast[1]), ("packing", fast[0], None)):
            if (head, packed) == (None, False):
                continue
            self.packed, self.head = packed, head
            try:
                wrong = abs(self._mean(model, some) - wanted)
            except (TypeError, ValueError, RuntimeError, AttributeError) as error:
                wrong, why = np.inf, str(error).splitlines()[0]
            else:
                why = f"the loss differs by {wrong:.1e}"
            if not wrong <= _TOLERANCE[self.compute or next(model.parameters()).dtype]:
                said.append(f"{name} does not fit this model and is off ({why})")
                fast = (fast[0] and not packed, fast[1] if head is None else None)
        self.packed, self.head = fast
        return said

    def _mean(self, model: Any, rows: Sequence[Encoded]) -> float:
        loss, _, count = self.score(model, rows)
        return loss / count

    def batch(self, rows: Sequence[Encoded]) -> dict[str, Any]:
        """Rows to what `loss` and `score` take.

        Returns:
            packed: `input_ids`, `position_ids` (1, T), filled up by a row of padding (`schedule.filled`); `places`
            (N,), int64, where a learned token is predicted; `targets` (1, N); `row_lengths`. Padded: `input_ids`, `attention_mask` (B, S); `places` (C,), the columns;
            `targets` (B, C), -100 where nothing is learned.
        """
        if not self.packed:
            arrays = collate(rows, self.pad_id)
            labels = arrays["labels"][:, 1:]
            places = np.flatnonzero((labels != IGNORED).any(0))
            padded = {"input_ids": arrays["input_ids"], "attention_mask": arrays["attention_mask"]}
            return _tensors({**padded, "places": places, "targets": labels[:, places]})
        lengths = [len(row.ids) for row in rows]
        more = filled(sum(lengths)) - sum(lengths)
        ids = np.concatenate([*(np.asarray(row.ids, dtype=np.int64) for row in rows), np.full(more, self.pad_id)])
        learned = np.concatenate([*([False, *row.learned[1:]] for row in rows), np.zeros(more)]).astype(bool)
        lengths += [more] if more else []
        positions = np.concatenate([np.arange(length) for length in lengths])
        places = np.flatnonzero(learned)
        made = _tensors({"input_ids": ids[None], "position_ids": positions[None], "places": places - 1})
        made["targets"] = torch.from_numpy(ids[places])[None]
        return {**made, "row_lengths": lengths}

    def loss(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        """The summed loss of a batch, float32, a scalar; the model is in training mode."""
        if self.taught:
            with self.taught.listening():
                self._forward(model, batch)
        out = self._forward(model, batch)
        if self.head is not None:
            return out.sum()
        logits, targets = self._chosen(out, batch)
        smoothing = self.smoothing if model.training else 0.0
        return torch.nn.functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)

    def score(self, model: Any, rows: Sequence[Encoded]) -> tuple[float, int, int]:
        """Summed loss (nats), right tokens and learned tokens of `rows`; the model's mode is restored afterwards."""
        was_training = model.training
        model.eval()
        device = shards.device(model)
        batch = {name: v.to(device) if torch.is_tensor(v) else v for name, v in self.batch(rows).items()}
        count = int((batch["targets"] != IGNORED).sum())
        with torch.no_grad():
            out = self._forward(model, batch)
            if self.head is not None:
                found = float(out.sum()), self.head.correct, count
            else:
                logits, targets = self._chosen(out, batch)
                loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
                found = float(loss), int((logits.argmax(-1) == targets).sum()), count
        model.train(was_training)
        return found

    def _forward(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        inputs: dict[str, Any] = {"input_ids": batch["input_ids"]}
        if "row_lengths" in batch:
            # a mask of four axes is passed on as it is: no mask of T x T is made, none is needed
            nothing = torch.empty(1, 1, 1, 1, device=batch["input_ids"].device)
            inputs |= {"position_ids": batch["position_ids"], "attention_mask": nothing}
            inputs["row_lengths"] = batch["row_lengths"]
        else:
            inputs["attention_mask"] = batch["attention_mask"]
        if self.head is not None:
            self.head.targets = batch["targets"]
        kind = batch["input_ids"].device.type
        cast = torch.autocast(kind, self.compute) if self.compute else contextlib.nullcontext()
        try:
            with cast:
                return model(**inputs, logits_to_keep=batch["places"], use_cache=False).logits
        finally:
            if self.head is not None:
                self.head.targets = None

    @staticmethod
    def _chosen(logits: torch.Tensor, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        learned = batch["targets"] != IGNORED
        return logits[learned].float(), batch["targets"][learned]


def _tensors(arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()}
