"""Distillation of a model from itself: rounded, it learns to give the next-token distributions that it has unrounded.

Before each pass the same rows go through the plain weights, without gradients; the head keeps its inputs. The loss of the
rounded pass is then the task's plus a share of KL(plain || rounded), at the tokens that carry loss (Hinton et al.,
arXiv 1503.02531). The plain model is the one that is merged, so this is the divergence that the gate measures.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from edgetune.data.batch import IGNORED
from edgetune.errors import InputError
from edgetune.export.quantize.grid import Quantized
from edgetune.export.quantize.heal_loss import Heads, divergence
from edgetune.export.quantize.plan import Plan
from edgetune.models import Base
from edgetune.train.grids import Rounding, install
from edgetune.train.loss import LossHead
from edgetune.train.objective import Objective


class TaughtHead(LossHead):
    """A head that adds the divergence from what it heard before to the loss, in training.

    Attributes:
        share: what the divergence weighs.
        plain: its weight without rounding.
        heard: the plain model's hidden states (N, hidden) of the tokens with loss; None where there is no teacher.
        listens: keep the hidden states that come now, and compute no loss.
    """

    share: float
    plain: torch.Tensor
    heard: torch.Tensor | None
    listens: bool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As `LossHead`."""
        if self.targets is None or not self.training:
            return super().forward(x)
        learned = self.targets.reshape(-1) != IGNORED
        flat = x.reshape(-1, x.shape[-1])[learned]
        if self.listens:
            self.heard = flat
            return x.new_zeros(1, 1, 1)
        loss = super().forward(x)
        if self.heard is None:
            return loss
        return loss + self.share * divergence(flat, self.heard, Heads(self.plain, self.weight, self.bias))


class Taught:
    """A head and the rounding that is off while it listens."""

    def __init__(self, head: LossHead, rounding: Rounding, share: float) -> None:
        head.__class__ = TaughtHead  # the module stays the same object: ties, hooks and names hold
        made: Any = head
        made.share, made.plain, made.heard, made.listens = share, rounding.plain(head.weight), None, False
        self._head, self._rounding = made, rounding

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """For a pass of the plain model, which the next pass is compared with."""
        self._head.listens = True
        try:
            with self._rounding.off(), torch.no_grad():
                yield
        finally:
            self._head.listens = False


def learn_through(
    plan: Plan, begin: Callable[[], Mapping[str, Quantized]], share: float, model: Any, objective: Objective, base: Base
) -> Rounding:
    """Let a model learn through rounded weights, and from itself unrounded.

    Args:
        plan: what the export rounds to.
        begin: gives what it begins with, as `grids.start` does; called once nothing is left to refuse.
        share: what the divergence from the unrounded model weighs; 0 leaves it out.
        model: peft's, on the device that trains.
        objective: its own.
        base: whose weights it has.

    Raises:
        InputError: a model or a plan that this cannot be done with.
    """
    if share and objective.head is None:
        raise InputError(
            "this model's head is no plain product, so that its distributions cannot be compared a piece at a time",
            where="train.distillation",
            fix="set it to 0, or train without train.quantization_aware",
        )
    rounding = install(model, plan, base, begin)
    if share and objective.head is not None:
        objective.taught = Taught(objective.head, rounding, share)
    return rounding
