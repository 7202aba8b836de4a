"""Heals a quantized model: its codes and scales learn to give the merged model's own next-token distributions.

The merged model is the teacher, the quantized one, on exactly its grids, the student, and rows of text are the data;
the loss is the KL divergence that the gate measures (Hinton et al., arXiv 1503.02531; for scales alone after GPTQ see
Chen et al., "EfficientQAT", arXiv 2407.11062). What is returned is the best by that divergence on rows that are held
out here, and what was given where nothing was better.
"""

from __future__ import annotations

import hashlib
import io
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgetune import progress
from edgetune.data.batch import Encoded
from edgetune.errors import InputError
from edgetune.export.quantize.grid import Quantized
from edgetune.files import digest, write_bytes
from edgetune.models.quiet import quiet
from edgetune.recipe import HealSection

if TYPE_CHECKING:
    import torch

_FEWEST_ROWS = 8
_FEWEST_TOKENS = 1_000
_HELD_OUT = 0.1  # of the rows, by which the best step is chosen
_HELD_OUT_TOKENS = 3_000
_LOOKS = 8  # at the held-out rows, in all
_WARM = 0.1  # of the steps, in which the learning rate grows
_CHECKPOINT_S = 60.0


@dataclass(frozen=True)
class Healed:
    """Attributes:
    found: the matrices, on the grids that they were given on.
    report: steps, the best step, KL and top-1 agreement before and after on the rows held out here, seconds.
    """

    found: dict[str, Quantized]
    report: dict[str, Any]


def heal(
    folder: Path,
    found: Mapping[str, Quantized],
    rows: Sequence[Encoded],
    section: HealSection,
    *,
    seed: int,
    floats: Mapping[str, torch.Tensor] | None = None,
    checkpoints: Path | None = None,
    trust_remote_code: bool = False,
) -> Healed:
    """Let the codes and scales of a quantized model learn from its float self.

    Args:
        folder: merged transformers folder, the teacher.
        found: the quantized matrices by full module name; a tied embedding is `lm_head`.
        rows: encoded rows; a tenth of them is held out, to choose the best step by.
        section: the recipe's `export.heal`; how many steps, and how large.
        seed: of the order of rows and of the first low-rank matrices.
        floats: tensors of the quantized model that are not the merged model's (smoothed norms), by their names there.
        checkpoints: folder in which a file keeps what was learned, once a minute; a later call with the same arguments
            goes on from it. The caller removes it.
        trust_remote_code: run code that the folder brings.

    Raises:
        InputError: too few rows, or a matrix that the model does not have.
    """
    started = time.monotonic()
    require_rows(len(rows), sum(len(row.ids) for row in rows))
    with quiet():
        work = _Work(folder, found, rows, section, seed, floats or {}, trust_remote_code)
        kept = _Kept(checkpoints, work.key)
        work.learn(kept)
    best, report = kept.best, work.report(kept)
    report["seconds"] = round(time.monotonic() - started, 1)
    if best is None:
        return Healed(dict(found), report)
    work.student.load(best)
    return Healed({name: matrix.quantized() for name, matrix in work.student.matrices.items()}, report)


def require_rows(rows: int, tokens: int, where: str = "data.train") -> None:
    """Raise InputError where so many rows, of so many tokens in all, are too few; `where` is their place."""
    if rows < _FEWEST_ROWS or tokens < _FEWEST_TOKENS:
        raise InputError(
            f"{rows} rows of {tokens:,} tokens are too few to heal on",
            where=where,
            fix=f"give {_FEWEST_ROWS} rows with {_FEWEST_TOKENS:,} tokens or more, or set export.heal.steps: 0",
        )


@dataclass
class _State:
    """What was learned after a number of steps, and the optimizer's state."""

    step: int = 0
    learned: dict[str, Any] | None = None
    optimizer: dict[str, Any] | None = None


@dataclass
class _Kept:
    """What outlives a crash: the last state, the best so far, and every measurement.

    Attributes:
        looks: step, KL and top-1 agreement on the held-out rows.
        best: what was learned when the KL was least; None when that was before the first step.
    """

    folder: Path | None
    key: str
    state: _State = field(default_factory=_State)
    best: dict[str, Any] | None = None
    looks: list[dict[str, float]] = field(default_factory=list)
    stopped: str = ""
    _written: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        import torch

        if self.folder is None or not (path := self.folder / "heal.pt").is_file():
            return
        read = torch.load(path, weights_only=True)
        if read["key"] == self.key:
            self.state, self.best, self.looks = _State(**read["state"]), read["best"], read["looks"]

    def due(self) -> bool:
        return self.folder is not None and time.monotonic() - self._written > _CHECKPOINT_S

    def write(self) -> None:
        import torch

        if self.folder is None:
            return
        out = io.BytesIO()
        torch.save({"key": self.key, "state": vars(self.state), "best": self.best, "looks": self.looks}, out)
        write_bytes(self.folder / "heal.pt", out.getvalue())
        self._written = time.monotonic()


class _Work:
    """Teacher's states, student, rows: all that the steps need."""

    def __init__(
        self,
        folder: Path,
        found: Mapping[str, Quantized],
        rows: Sequence[Encoded],
        section: HealSection,
        seed: int,
        floats: Mapping[str, torch.Tensor],
        trust_remote_code: bool,
    ) -> None:
        from edgetune.export.quantize.heal_samples import own_rows
        from edgetune.export.quantize.heal_student import Student
        from edgetune.models import stop_ids

        self.section = section
        draw = np.random.default_rng([seed, len(rows)])
        chosen = [_at(row, section.positions) for row in rows]
        order = [int(i) for i in draw.permutation(len(rows)) if any(chosen[i].learned[1:])]
        if len(order) < _FEWEST_ROWS:
            raise InputError(
                f"only {len(order)} rows hold a token that carries loss",
                where="data.train",
                fix="give other rows, or set export.heal.positions: all",
            )
        held: list[int] = []
        tokens = 0
        while len(held) < max(2, _HELD_OUT * len(rows)) and tokens < _HELD_OUT_TOKENS:
            held.append(order.pop())
            tokens += len(rows[held[-1]].ids)
        self.student = Student(folder, chosen, trust_remote_code=trust_remote_code)
        if section.samples:
            own = own_rows(self.student.model, [rows[i] for i in order], section.samples, stop_ids(folder), seed)
            own = [row for row in own if any(row.learned[1:])]
            order += self.student.add([_at(row, section.positions) for row in own])
        self.steps = _steps(order, [len(row.ids) for row in self.student.rows], section, draw)
        used = sorted({i for step in self.steps for i in step} | set(held))
        self.student.listen(used)
        self.student.become(dict(found), floats, section.rank, seed)
        self.held = held
        self.key = digest(
            {"section": section.model_dump(), "seed": seed, "rows": _hash_rows(rows), "matrices": _hash_matrices(found)}
        )

    def learn(self, kept: _Kept) -> None:
        import torch

        student, section = self.student, self.section
        optimizer = torch.optim.AdamW(
            student.groups(section.learning_rate, section.rank_learning_rate),
            betas=(0.9, 0.95),
            eps=1e-20,
            weight_decay=0.0,
            fused=True,
        )
        peaks = [group["lr"] for group in optimizer.param_groups]
        if kept.state.learned is not None and kept.state.optimizer is not None:
            student.load(kept.state.learned)
            optimizer.load_state_dict(kept.state.optimizer)
            progress.say(f"heal: resuming after step {kept.state.step} of {section.steps}")
        elif not kept.looks:
            self._look(kept, 0)
        first = kept.state.step
        with progress.task("heal", section.steps) as bar:
            bar.advance(first)
            for number in range(first, section.steps):
                for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                    group["lr"] = peak * _rate(number, section.steps)
                began = time.monotonic()
                loss = student.step(self.steps[number])
                if not math.isfinite(loss):
                    kept.stopped = f"the loss of step {number + 1} is not a number"
                    progress.say(f"heal: {kept.stopped}; what was best before is kept")
                    break
                optimizer.step()
                optimizer.zero_grad()
                student.refresh()
                if number == first + 1:
                    left = (time.monotonic() - began) * (section.steps - number - 1)
                    progress.say(f"heal: {section.steps} steps, about {progress.clock(left)}")
                if (number + 1) % max(1, section.steps // _LOOKS) == 0 or number + 1 == section.steps:
                    self._look(kept, number + 1)
                kept.state = _State(number + 1, student.learned(), optimizer.state_dict())
                if kept.due():
                    kept.write()
                bar.advance(1, f"KL {loss:.4f}")
        kept.write()

    def _look(self, kept: _Kept, step: int) -> None:
        kl, same = self.student.score(self.held)
        kept.looks.append({"step": step, "kld_mean": kl, "top1_agreement": same})
        if step and kl <= min(look["kld_mean"] for look in kept.looks):
            kept.best = {name: value.clone() for name, value in self.student.learned().items()}

    def report(self, kept: _Kept) -> dict[str, Any]:
        """What the export's report says of it."""
        best = min(kept.looks, key=lambda look: look["kld_mean"])
        return {
            **self.section.model_dump(),
            "steps_done": kept.state.step,
            "best_step": best["step"],
            "held_out": {"rows": len(self.held), "before": kept.looks[0], "after": best},
            "looks": kept.looks,
            "stopped": kept.stopped,
        }


def _rate(step: int, steps: int) -> float:
    """Share of the peak learning rate: a linear warm-up, then half a cosine."""
    warm = max(1, round(_WARM * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _at(row: Encoded, positions: str) -> Encoded:
    """The row with what is compared marked as learned."""
    return row if positions == "learned" else Encoded(row.ids, [False, *[True] * (len(row.ids) - 1)], row.notes)


def _steps(
    order: Sequence[int], lengths: Sequence[int], section: HealSection, draw: np.random.Generator
) -> list[list[int]]:
    """Row numbers of each step; every pass over the rows has an order of its own."""
    steps: list[list[int]] = []
    while len(steps) < section.steps:
        step: list[int] = []
        for row in draw.permutation(np.array(order)).tolist():
            if step and sum(lengths[i] for i in step) + lengths[row] > section.step_tokens:
                steps.append(step)
                step = []
            step.append(row)
        if not steps or len(order) < 2:
            steps.append(step)
    return steps[: section.steps]


def _hash_rows(rows: Sequence[Encoded]) -> str:
    total = hashlib.sha256()
    for row in rows:
        total.update(np.asarray(row.ids, np.int64).tobytes() + np.asarray(row.learned, bool).tobytes())
    return total.hexdigest()


def _hash_matrices(found: Mapping[str, Quantized]) -> str:
    total = hashlib.sha256()
    for name, matrix in sorted(found.items()):
        total.update(f"{name} {matrix.grid}".encode())
        total.update(matrix.codes.numpy().tobytes())
        total.update(matrix.scales.numpy().tobytes())
    return total.hexdigest()
