"""What the curves of a training say: overfitting, too few steps, a rate that is too high, and divergence that is no NaN.

All of it is read from the rows of `metrics.jsonl`: `step` with `loss` (training) or `validation_loss`, in nats a token;
the validation of step 0 is the base model's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

Points = list[tuple[int, float]]  # (step, loss)

# Two validation losses on the same rows count as different from here on: a share of the loss, and nats.
_APART, _APART_NATS = 0.01, 0.01
# A median absolute deviation times this is the standard deviation, where the values are normal.
_SIGMA = 1.4826
# A loss this many deviations off is a spike, as in the spike score of arXiv 2501.00656. Median and median absolute
# deviation stand here for mean and standard deviation, which a single spike would move.
_DEVIATIONS = 7.0

_WINDOW, _ENOUGH = 50, 20  # training losses that say what is usual: at most, at least
_LASTING = 5  # steps in a row far above the usual before it is divergence
_LOST = 20  # steps in a row far above where training began


@dataclass(frozen=True)
class Spike:
    """A training loss that went up and stays there.

    Attributes:
        step: the first step of it.
        steps: how many there were so far.
        loss: their median, in nats a token.
        usual: the median before.
    """

    step: int
    steps: int
    loss: float
    usual: float

    def text(self) -> str:
        """One clause for an error message."""
        return (
            f"loss {self.loss:.3f} since step {self.step}, {self.steps} steps in a row; before, it was {self.usual:.3f}"
        )


def spike(metrics: Sequence[Mapping[str, Any]]) -> Spike | None:
    """Whether training has diverged although its loss is still a number. To be asked after each step.

    Two rules, made so that noise of small batches does not set them off:

    - The last 5 training losses are each above every one of the (at most 50, at least 20) before them, above 1.5 times
      their median, more than half a nat above it, and more than 7 robust standard deviations. For losses that are
      merely noisy, the first condition alone is met once in 3.5 million steps.
    - The last 20 are each above twice what training began with (the base's validation loss, or the first training
      losses where those are higher) and more than a nat above it: it diverged before there was a usual loss.

    Args:
        metrics: rows so far, in order. Only the last ones and the first are looked at.
    """
    first = _losses(metrics[:20], "loss")[:5]
    recent = _losses(metrics[-2 * (_WINDOW + _LASTING) :], "loss")[-(_WINDOW + _LASTING) :]
    before, last = recent[:-_LASTING], recent[-_LASTING:]
    if len(before) >= _ENOUGH:
        usual = [loss for _, loss in before]
        middle = median(usual)
        limit = max(*usual, 1.5 * middle, middle + 0.5, middle + _DEVIATIONS * _spread(usual))
        if all(loss > limit for _, loss in last):
            return Spike(last[0][0], len(last), median(loss for _, loss in last), middle)
    last = recent[-_LOST:]
    if first and len(last) == _LOST and last[0][0] > first[-1][0]:
        base = [loss for step, loss in _losses(metrics[:1], "validation_loss") if step == 0]
        began = max(*base, median(loss for _, loss in first)) if base else median(loss for _, loss in first)
        if all(loss > max(2 * began, began + 1.0) for _, loss in last):
            return Spike(last[0][0], len(last), median(loss for _, loss in last), began)
    return None


def remarks(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a person should know of how a training went, with what to try. Empty for a training that went well.

    Args:
        metrics: all rows. Keys that are missing and losses that are no number are passed over.
    """
    training, validations = _losses(metrics, "loss"), _losses(metrics, "validation_loss")
    base = next((loss for step, loss in validations if step == 0), None)
    after = [point for point in validations if point[0] > 0]
    if not after:
        return []
    found = [_no_learning(base, after, training), _overfitting(training, after)]
    if not any(found):
        found += [_still_falling(base, after), _plateau(base, after)]
    found.append(_jumps(training))
    return [text for text in found if text]


def _losses(metrics: Sequence[Mapping[str, Any]], key: str) -> Points:
    """(step, loss) of the rows that have it, as a number that can be reckoned with."""
    found = []
    for row in metrics:
        step, loss = row.get("step"), row.get(key)
        if isinstance(step, int) and isinstance(loss, int | float) and math.isfinite(loss) and abs(loss) < 1e6:
            found.append((step, float(loss)))
    return found


def _spread(losses: Sequence[float]) -> float:
    """A standard deviation that outliers do not move."""
    middle = median(losses)
    return _SIGMA * median(abs(loss - middle) for loss in losses)


def _apart(low: float, high: float) -> bool:
    """Whether `high` is above `low` by more than validation losses move without a reason."""
    return high - low > max(_APART_NATS, _APART * abs(low))


def _best(after: Points) -> tuple[int, float]:
    return min(after, key=lambda point: point[1])


def _mean(training: Points, since: int, until: int) -> float | None:
    """Mean training loss of the steps after `since` up to `until`."""
    part = [loss for step, loss in training if since < step <= until]
    return sum(part) / len(part) if part else None


def _no_learning(base: float | None, after: Points, training: Points) -> str | None:
    if base is None:
        return None
    step, best = _best(after)
    if best < base:
        return None
    said = f"validation loss never fell below the base model's {base:.3f} (best {best:.3f}, step {step})"
    if _apart(base, best):
        cause = "the model got worse: lower train.learning_rate, raise train.warmup, or check that the rows are right"
    elif _fell(training):
        cause = (
            "training loss fell, so it does not carry over: use more rows, or validation rows like the training rows"
        )
    else:
        cause = "hardly anything was learned: raise train.learning_rate, train longer, or check that the rows are right"
    return f"{said}; {cause}"


def _fell(training: Points) -> bool:
    """Whether the last quarter of the training losses lies below the first one."""
    quarter = len(training) // 4
    if not quarter:
        return False
    first, last = ([loss for _, loss in part] for part in (training[:quarter], training[-quarter:]))
    return _apart(sum(last) / quarter, sum(first) / quarter)


def _overfitting(training: Points, after: Points) -> str | None:
    """Validation loss went up from its best while training loss went on falling."""
    step, best = _best(after)
    last_step, last = after[-1]
    if last_step <= step or not _apart(best, last):
        return None
    steps = [0, *(at for at, _ in after)]
    at_best = _mean(training, steps[steps.index(step) - 1], step)
    at_end = _mean(training, steps[-2], last_step)
    if at_best is None or at_end is None or not _apart(at_end, at_best):
        return None
    return (
        f"overfitting: validation loss rose from {best:.3f} (step {step}) to {last:.3f} (step {last_step}) while training "
        f"loss fell from {at_best:.3f} to {at_end:.3f}. The checkpoint of step {step} was kept. Try train.max_steps={step}, "
        "train.early_stopping, a lower train.learning_rate or train.rank, train.dropout, or more rows"
    )


def _still_falling(base: float | None, after: Points) -> str | None:
    """The last stretch brought about as much as each before it."""
    points = ([(0, base)] if base is not None else []) + after
    if len(points) < 3 or _best(after) != after[-1]:
        return None
    (before_step, before), (step, last) = points[-2:]
    whole = points[0][1] - last
    share = (step - before_step) / max(step - points[0][0], 1)
    if before - last < 0.02 * abs(before) or before - last < 0.7 * share * whole:
        return None
    return (
        f"validation loss was still falling at the end ({before:.3f} at step {before_step}, {last:.3f} at step {step}): "
        "train longer (train.epochs), or raise train.learning_rate"
    )


def _plateau(base: float | None, after: Points) -> str | None:
    """The second half of the steps brought nothing."""
    points = ([(0, base)] if base is not None else []) + after
    last_step = points[-1][0]
    half = [point for point in points if point[0] <= last_step / 2]
    later = [loss for step, loss in points if step > last_step / 2]
    if len(half) < 2 or len(later) < 2:
        return None
    step, before = half[-1]
    fall = points[0][1] - min(loss for _, loss in points)
    if fall <= 0 or any(abs(before - loss) > 0.01 * fall for loss in later):
        return None
    return (
        f"validation loss stands at {before:.3f} since step {step} of {last_step}: more steps bring nothing; fewer give "
        "the same sooner, more or other rows or a higher train.rank may bring more"
    )


def _jumps(training: Points) -> str | None:
    """Single losses far above the ones around them, several times: the rate is at the edge of what holds."""
    found: Points = []
    for at in range(_ENOUGH, len(training)):
        usual = [loss for _, loss in training[max(0, at - _WINDOW) : at]]
        middle = median(usual)
        step, loss = training[at]
        if loss > max(1.5 * middle, middle + 0.5, middle + _DEVIATIONS * _spread(usual)):
            found.append((step, loss))
    # Neighbours are one jump.
    starts = found[:1] + [later for earlier, later in pairwise(found) if later[0] - earlier[0] > 3]
    if len(starts) < 3:
        return None
    named = ", ".join(str(step) for step, _ in starts[:5]) + (", …" if len(starts) > 5 else "")
    return (
        f"training loss jumped {len(starts)} times (steps {named}; up to {max(loss for _, loss in found):.3f}, usually "
        f"{median(loss for _, loss in training):.3f}): lower train.learning_rate, raise train.warmup, or look at the rows "
        "of these steps"
    )
