"""The head and the cross-entropy in one, a few rows of logits at a time: the logits of a batch never exist whole."""

from __future__ import annotations

from typing import Any

import torch

from edgetune.data.batch import IGNORED

_FLOATS = 4_000_000  # logits at a time: they and their exponentials stay in the cache (16 MB in float32)


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
        rows = max(16, _FLOATS // weight.shape[0])
        learns_x, learns_weight, learns_bias, *_ = ctx.needs_input_grad
        if learns_weight:
            rows *= 4  # each piece passes over the whole gradient of W
        dx = torch.empty_like(x) if learns_x else None
        dweight = torch.zeros_like(weight) if learns_weight else None
        dbias = torch.zeros_like(bias) if bias is not None and learns_bias else None
        loss = x.new_zeros((), dtype=torch.float32)
        matrix = weight.to(x.dtype)
        for start in range(0, len(x), rows):
            part, wanted = x[start : start + rows], targets[start : start + rows, None]
            logits = torch.nn.functional.linear(part, matrix, None if bias is None else bias.to(x.dtype)).float()
            total = torch.logsumexp(logits, -1, keepdim=True)
            loss += (total - (1 - smoothing) * logits.gather(1, wanted)).sum()
            if smoothing:
                loss -= smoothing * logits.mean(-1).sum()
            if dx is None and dweight is None and dbias is None:
                continue
            slope = logits.sub_(total).exp_()
            slope.scatter_add_(1, wanted, torch.full_like(wanted, smoothing - 1, dtype=slope.dtype))
            if smoothing:
                slope -= smoothing / slope.shape[1]
            if dbias is not None:
                dbias += slope.sum(0)
            slope = slope.to(x.dtype)
            if dx is not None:
                torch.mm(slope, matrix, out=dx[start : start + rows])
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
    rows = max(16, _FLOATS // weight.shape[0])
    loss, correct = x.new_zeros((), dtype=torch.float32), 0
    for part, wanted in zip(x.split(rows), targets.split(rows), strict=True):
        logits = torch.nn.functional.linear(part, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        loss += torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="sum")
        correct += int((logits.argmax(-1) == wanted).sum())
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
