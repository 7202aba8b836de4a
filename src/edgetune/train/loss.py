"""The head and the cross-entropy in one, a few rows of logits at a time: the logits of a batch never exist whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from edgetune.data.batch import IGNORED

_FLOATS = 4_000_000  # logits at a time: they and their exponentials stay in the cache (16 MB in float32)


class _Pieces:
    """A few rows of x (N, hidden) after the other with their targets and float32 logits (n, V), always in the same memory."""

    def __init__(
        self, x: torch.Tensor, targets: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None, rows: int = 1
    ) -> None:
        self.x, self.targets, self.matrix, self.bias = x, targets, matrix, bias
        self.rows = min(max(1, len(x)), rows * max(16, _FLOATS // len(matrix)))
        self._made = x.new_empty(self.rows, len(matrix))
        self._wide = self._made if x.dtype == torch.float32 else torch.empty_like(self._made, dtype=torch.float32)

    def __iter__(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
        for start in range(0, len(self.x), self.rows):
            place = slice(start, min(start + self.rows, len(self.x)))
            part, wanted, made = self.x[place], self.targets[place, None], self._made[: place.stop - start]
            torch.mm(part, self.matrix.t(), out=made)
            if self.bias is not None:
                made += self.bias
            yield place, part, wanted, self._wide[: len(made)].copy_(made)

    def narrow(self, shares: torch.Tensor) -> torch.Tensor:
        """Float32 (n, V) in the dtype of x, in the place of the piece's own logits."""
        return self._made[: len(shares)].copy_(shares)


class _HeadLoss(torch.autograd.Function):
    """Σ cross-entropy of softmax(x·Wᵀ + b) over N tokens; gradients are computed with the loss, in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        smoothing: float,
    ) -> torch.Tensor:
        learns_x, learns_weight, learns_bias, *_ = ctx.needs_input_grad
        dx = torch.empty_like(x) if learns_x else None
        dweight = torch.zeros_like(weight) if learns_weight else None
        dbias = torch.zeros_like(bias) if bias is not None and learns_bias else None
        learns = dx is not None or dweight is not None or dbias is not None
        loss = x.new_zeros((), dtype=torch.float32)
        matrix, added = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        pieces = _Pieces(x, targets, matrix, added, rows=4 if learns_weight else 1)
        for place, part, wanted, logits in pieces:
            at_target = logits.gather(1, wanted)
            mean = logits.mean(-1).sum() if smoothing else 0.0
            greatest = logits.amax(-1, keepdim=True)
            shares = logits.sub_(greatest).exp_()
            total = shares.sum(-1, keepdim=True)
            loss += (total.log() + greatest - (1 - smoothing) * at_target).sum() - smoothing * mean
            if not learns:
                continue
            shares.div_(total)
            shares.scatter_add_(1, wanted, torch.full_like(wanted, smoothing - 1, dtype=shares.dtype))
            if smoothing:
                shares -= smoothing / shares.shape[1]
            if dbias is not None:
                dbias += shares.sum(0)
            slope = pieces.narrow(shares)
            if dx is not None:
                torch.mm(slope, matrix, out=dx[place])
            if dweight is not None:
                dweight += slope.t() @ part
        ctx.save_for_backward(dx, dweight, dbias)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        dx, dweight, dbias = (None if grad is None else grad * grads[0].to(grad.dtype) for grad in ctx.saved_tensors)
        return dx, dweight, dbias, None, None


@torch.no_grad()
def _score(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> tuple[torch.Tensor, int]:
    loss, correct = x.new_zeros((), dtype=torch.float32), 0
    for _, _, wanted, logits in _Pieces(x, targets, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)):
        loss += torch.nn.functional.cross_entropy(logits, wanted[:, 0], reduction="sum")
        correct += int((logits.argmax(-1, keepdim=True) == wanted).sum())
    return loss, correct


class LossHead(torch.nn.Linear):
    """A model's head that gives the loss in place of logits while it is told the targets.

    It is the head itself, in its place and under its name, so that engines that gather a module's weights around its
    forward pass gather these, and what is saved is unchanged.

    Attributes:
        targets: token ids, int64, in the shape of the hidden states that the head is about to be given without their
            last axis; -100 where nothing is learned. None for logits.
        smoothing: share of each target that goes to all tokens alike; not in evaluation mode.
        correct: of the last call in evaluation mode, at how many targets the best token was the target.
    """

    targets: torch.Tensor | None
    smoothing: float
    correct: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (…, hidden) to logits (…, V), or, where there are targets, the summed loss, float32, shape (1, 1, 1)."""
        if self.targets is None:
            return super().forward(x)
        flat, targets = x.reshape(-1, x.shape[-1]), self.targets.reshape(-1)
        learned = targets != IGNORED
        if not learned.all():
            flat, targets = flat[learned], targets[learned]
        if torch.is_autocast_enabled(x.device.type):
            flat = flat.to(torch.get_autocast_dtype(x.device.type))
        with torch.autocast(x.device.type, enabled=False):
            if self.training:
                loss = _HeadLoss.apply(flat, self.weight, self.bias, targets, self.smoothing)
            else:
                loss, self.correct = _score(flat, self.weight, self.bias, targets)
        return loss.view(1, 1, 1)


def install(model: Any, smoothing: float) -> LossHead | None:
    """Let the head of `model` compute losses.

    Returns:
        The head; None where the model has no plain linear head (an adapter lies on it, say).
    """
    head: Any = model.get_output_embeddings()
    if hasattr(head, "modules_to_save"):  # peft's wrapper of a head that is trained whole
        head = head.modules_to_save[head.active_adapters[0]]
    if isinstance(head, LossHead):
        return head
    if type(head) is not torch.nn.Linear:
        return None
    head.__class__ = LossHead  # the module stays the same object: ties, hooks and names hold
    made: Any = head
    made.targets, made.smoothing, made.correct = None, smoothing, 0
    return made
