"""KL divergence of a student's next-token distributions from a teacher's, a few positions of logits at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from edgetune.export.quantize.grid import in_blocks
from edgetune.export.quantize.heal_layers import Matrix

_FLOATS = 12_000_000  # logits at a time
_ROUND = (
    64  # positions are filled up to a multiple of this: libraries make code for each size of a product that they meet
)


@dataclass(frozen=True)
class Heads:
    """How hidden states become logits, for the teacher and the student.

    Attributes:
        teacher, student: (V, hidden).
        bias: (V,), of both, or None.
        matrix: what the student's is made of, where its scales learn.
    """

    teacher: torch.Tensor
    student: torch.Tensor
    bias: torch.Tensor | None = None
    matrix: Matrix | None = None

    def logits(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Float32 (n, V)."""
        return torch.nn.functional.linear(hidden, weight, self.bias).float()


class _Divergence(torch.autograd.Function):
    """Σ KL(teacher || student) over N positions; the gradients are computed with it, in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, stretch: torch.Tensor, teacher: torch.Tensor, heads: Heads
    ) -> torch.Tensor:
        learns_x, learns_head, *_ = ctx.needs_input_grad
        count, (student, teacher) = len(student), (_filled(student), _filled(teacher))
        dx = torch.empty_like(student) if learns_x else None
        dstretch = torch.zeros_like(stretch) if learns_head and heads.matrix else None
        total = torch.zeros((), device=student.device)
        for place in _places(len(student), len(heads.student)):
            part, there = student[place], max(0, count - place.start)  # beyond `there` is what was filled up
            wanted = heads.logits(teacher[place], heads.teacher).log_softmax(-1)
            found = heads.logits(part, heads.student).log_softmax(-1)
            shares = wanted.exp()
            total += shares.mul(wanted.sub_(found))[:there].sum()
            if dx is None:
                continue
            slope = found.exp_().sub_(shares).to(part.dtype)
            slope[there:] = 0
            torch.mm(slope, heads.student, out=dx[place])
            if dstretch is not None and heads.matrix:
                pull = (slope.t() @ part).mul_(heads.student)
                dstretch += in_blocks(pull, heads.matrix.grid).sum(-1, dtype=torch.float32)
        dx = None if dx is None else dx[:count]
        ctx.save_for_backward(dx, dstretch)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        dx, dstretch = (None if one is None else one * grads[0].to(one.dtype) for one in ctx.saved_tensors)
        return dx, dstretch, None, None


def _filled(hidden: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(hidden, (0, 0, 0, -len(hidden) % _ROUND))


def _places(count: int, vocabulary: int) -> list[slice]:
    step = max(1, _FLOATS // vocabulary // _ROUND) * _ROUND
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def divergence(student: torch.Tensor, teacher: torch.Tensor, heads: Heads) -> torch.Tensor:
    """Σ KL(teacher || student), float32, a scalar.

    Args:
        student, teacher: last hidden states (N, hidden).
        heads: makes logits of them.
    """
    stretch = student.new_zeros(()) if heads.matrix is None else heads.matrix.stretch
    found: torch.Tensor = _Divergence.apply(student, stretch, teacher, heads)
    return found


@torch.no_grad()
def score(student: torch.Tensor, teacher: torch.Tensor, heads: Heads) -> tuple[float, int]:
    """Σ KL(teacher || student) over N positions, and at how many both models' best token is the same."""
    total, same, count = 0.0, 0, len(student)
    student, teacher = _filled(student), _filled(teacher)
    for place in _places(len(student), len(heads.student)):
        there = max(0, count - place.start)
        wanted = heads.logits(teacher[place], heads.teacher).log_softmax(-1)[:there]
        found = heads.logits(student[place], heads.student).log_softmax(-1)[:there]
        same += int((wanted.argmax(-1) == found.argmax(-1)).sum())
        total += float(wanted.exp().mul_(wanted.sub_(found)).sum())
    return total, same
