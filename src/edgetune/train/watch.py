"""The callback that validates, keeps the best adapter, checkpoints, and shows how far training is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import TrainerCallback

from edgetune import progress
from edgetune.errors import EdgetuneError
from edgetune.recipe import TrainSection
from edgetune.train import distributed
from edgetune.train.checkpoints import Checkpoints
from edgetune.train.curves import spike

_CHECKPOINT_EVERY_S = 300.0


@dataclass(frozen=True)
class Step:
    """What one optimizer step learns from: numbers of its rows, tokens in them, and how many of those carry loss."""

    rows: np.ndarray
    tokens: int
    learned: int


class Watcher(TrainerCallback):
    """Watches a training from its first step to its last.

    Args:
        section: the recipe's `train`.
        kept: the training's checkpoints.
        steps: every optimizer step.
        score: the model's validation, as `evaluate` gives it.
        place: where the row of a number comes from, as file:line.
    """

    def __init__(
        self,
        section: TrainSection,
        kept: Checkpoints,
        steps: Sequence[Step],
        score: Callable[[Any], dict[str, float]],
        place: Callable[[int], str],
    ) -> None:
        self._section, self._kept, self._steps, self._score, self._place = section, kept, steps, score, place
        self._every = max(1, math.ceil(len(steps) / section.evaluations))
        self._saved_at = self._step_at = 0.0
        self._shown: Any = None
        self._bar: Any = None
        self.begin: Callable[[Any], None] | None = None  # what is done first, with the model in the engine's hands

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.begin:
            self.begin(model)
        self._shown = progress.task("train", len(self._steps))
        self._bar = self._shown.__enter__()
        self._bar.advance(state.global_step)
        self._step_at = self._saved_at = time.monotonic()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any], model: Any = None, **kwargs: Any
    ) -> None:
        if "loss" not in logs:  # Trainer's summary at the end
            return
        number, loss, norm = state.global_step, float(logs["loss"]), float(logs["grad_norm"])
        step = self._steps[number - 1]
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self._diverged(number, f"loss {loss}, gradient norm {norm}")
        self._kept.record(
            {
                "step": number,
                "loss": loss,
                "grad_norm": norm,
                "learning_rate": float(logs["learning_rate"]),
                "tokens": step.tokens,
                "learned_tokens": step.learned,
                "seconds": round(time.monotonic() - self._step_at, 4),
            }
        )
        self._bar.advance(1, f"loss {loss:.3f}")
        if found := spike(self._kept.metrics):
            raise self._diverged(number, found.text())
        if number % self._every == 0 or number == len(self._steps):
            self._validate(number, model)
            control.should_training_stop = control.should_training_stop or stops(self._section, self._kept)
            control.should_save = True
        elif distributed.agreed(time.monotonic() - self._saved_at > _CHECKPOINT_EVERY_S):
            control.should_save = True
        self._step_at = time.monotonic()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        distributed.wait()  # each process writes its random state
        self._kept.complete(state.global_step)
        self._step_at = self._saved_at = time.monotonic()

    def close(self, *error: Any) -> None:
        """End the progress display; called however training ends."""
        if self._shown:
            self._shown.__exit__(*error)
            self._shown = None

    def _validate(self, number: int, model: Any) -> None:
        found = self._score(model)
        earlier = [loss for at, loss in self._kept.validations() if at]
        if not earlier or found["loss"] < min(earlier):
            self._kept.keep_best(model, number, found["loss"])
        self._kept.record({"step": number, **{f"validation_{name}": value for name, value in found.items()}})
        self._bar.advance(0, f"validation loss {found['loss']:.3f}")

    def _diverged(self, number: int, how: str) -> EdgetuneError:
        rows = [self._place(int(row)) for row in self._steps[number - 1].rows]
        shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
        trained = (found for found in self._kept.validations() if found[0])
        best = min(trained, key=lambda found: found[1], default=None)
        kept = f"; the best adapter so far, of step {best[0]}, is in {self._kept.best}" if best else ""
        return EdgetuneError(
            f"training diverged: {how}; the step's rows: {shown}{kept}",
            where=f"step {number}",
            fix="lower train.learning_rate, raise train.warmup, look at these rows, or set train.dtype=float32",
        )


def stops(section: TrainSection, kept: Checkpoints) -> bool:
    """Whether early stopping says that training is over, from the validations so far."""
    rule = section.early_stopping
    losses = [loss for step, loss in kept.validations() if step]
    if rule is None or len(losses) <= rule.patience:
        return False
    return min(losses[-rule.patience :]) > min(losses[: -rule.patience]) - rule.min_delta
