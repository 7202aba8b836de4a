"""How far two models' next-token distributions are apart: what is measured at each position, and what it comes to.

KL divergence is that of the found from the wanted distribution, in nats. Δp is the change of the probability of the token
that really follows, as llama.cpp's perplexity tool reports it. The perplexities' ratio is exp of the mean of the paired
differences of log-probabilities, its standard error that of this mean times the ratio (delta method); tokens count as
independent, so that it is rather too small.
"""

from __future__ import annotations

import heapq
import math
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from edgetune.errors import GateError, InputError

if TYPE_CHECKING:
    import numpy as np
    import torch

PERCENTILES = {"kld_median": 50, "kld_p90": 90, "kld_p95": 95, "kld_p99": 99, "kld_p99_9": 99.9}
WORST = 10
_FIRST_BUCKET = 64  # positions; each further bucket ends at twice the position
_AT_ONCE = 64  # positions whose distributions are compared at once
_SHOWN = 3  # likeliest tokens that a worst place tells of
_NO_NUMBERS = "its logits are not finite numbers"
_WHOLE = "copy the model again; if it was trained: train again with a lower train.learning_rate"


class Place(NamedTuple):
    """A position where the two differ much.

    Attributes:
        kld: in nats.
        row, position: of the token that is predicted, from 0.
        wanted, found: the likeliest tokens and their probabilities.
        next: probability that each gives to the token that really follows.
    """

    kld: float
    row: int
    position: int
    wanted: list[tuple[int, float]]
    found: list[tuple[int, float]]
    next: tuple[float, float]


class Scores:
    """What is kept of each compared position: 49 bytes, and the worst places.

    Args:
        folders: of the wanted and of the found model, for messages.
    """

    def __init__(self, folders: tuple[Path | None, Path | None] = (None, None)) -> None:
        self._folders = folders
        self._kld, self._wanted, self._found = array("d"), array("d"), array("d")
        self._agree = array("b")
        self._positions, self._before, self._tokens = array("q"), array("q"), array("q")
        self._worst: list[Place] = []
        self._sum = 0.0

    def __len__(self) -> int:
        return len(self._kld)

    def add(
        self,
        wanted: torch.Tensor,
        found: torch.Tensor,
        row: int,
        start: int,
        ids: Sequence[int],
        learned: Sequence[bool],
    ) -> None:
        """Compare consecutive positions of a row where the next token carries loss.

        Args:
            wanted, found: logits (S, V), float32, of the positions from `start` on.
            row: the row's number, from 0.
            start: the first position.
            ids, learned: of the whole row.

        Raises:
            InputError: the wanted logits are not finite numbers.
            GateError: the found ones are not.
        """
        end = min(start + len(wanted), len(ids) - 1)
        at = [i for i in range(start, end) if learned[i + 1]]
        for first in range(0, len(at), _AT_ONCE):
            part = at[first : first + _AT_ONCE]
            here = [i - start for i in part]
            self._compare(wanted[here].log_softmax(-1), found[here].log_softmax(-1), row, part, ids)

    def _compare(self, p: torch.Tensor, q: torch.Tensor, row: int, at: Sequence[int], ids: Sequence[int]) -> None:
        import torch

        share = p.exp()
        parts = torch.where(share == 0, 0.0, share * (p - q))  # a token that is never wanted: 0 times whatever
        kld = parts.sum(-1).clamp(min=0).tolist()
        target = torch.tensor([[ids[i + 1]] for i in at])
        log_p, log_q = p.gather(-1, target)[:, 0].tolist(), q.gather(-1, target)[:, 0].tolist()
        if not all(map(math.isfinite, log_p)):
            raise InputError(f"{_NO_NUMBERS}, first in row {row + 1}", where=self._folders[0], fix=_WHOLE)
        if not all(map(math.isfinite, (*log_q, *kld))):
            fix = f"{_WHOLE}; if only its export does this: choose another target, such as cpu-int8"
            raise GateError(f"{_NO_NUMBERS}, first in row {row + 1}", where=self._folders[1], fix=fix)
        self._kld.extend(kld)
        self._wanted.extend(log_p)
        self._found.extend(log_q)
        self._agree.extend((p.argmax(-1) == q.argmax(-1)).int().tolist())
        self._positions.extend(i + 1 for i in at)
        self._before.extend(ids[i] for i in at)
        self._tokens.extend(ids[i + 1] for i in at)
        self._sum += sum(kld)
        for k, value in enumerate(kld):
            if len(self._worst) < WORST or value > self._worst[0].kld:
                both = math.exp(log_p[k]), math.exp(log_q[k])
                place = Place(value, row, at[k] + 1, _likeliest(p[k]), _likeliest(q[k]), both)
                (heapq.heappush if len(self._worst) < WORST else heapq.heapreplace)(self._worst, place)

    def mean(self) -> float:
        """Mean KL divergence so far, in nats."""
        return self._sum / max(1, len(self))

    def worst(self) -> list[Place]:
        """The places of the largest divergences, the worst first."""
        return sorted(self._worst, reverse=True)

    def summary(self) -> dict[str, Any]:
        """The numbers of the report, over all positions."""
        import numpy as np

        kld, wanted, found = (np.array(values) for values in (self._kld, self._wanted, self._found))
        count, ratio = len(kld), _exp(float((wanted - found).mean()))
        spread = float((wanted - found).std(ddof=1)) if count > 1 else None
        return {
            "kld_mean": float(kld.mean()),
            **{name: float(np.percentile(kld, share)) for name, share in PERCENTILES.items()},
            "kld_max": float(kld.max()),
            "delta_p_rms": float(np.sqrt(np.mean((np.exp(found) - np.exp(wanted)) ** 2))),
            "top1_agreement": float(np.mean(self._agree)),
            "perplexity": {
                "merged": _exp(-float(wanted.mean())),
                "artifact": _exp(-float(found.mean())),
                "ratio": ratio,
                "ratio_se": None if spread is None else ratio * spread / math.sqrt(count),
            },
            "tokens": count,
        }

    def by_position(self) -> dict[str, dict[str, float]]:
        """The same in short for ranges of positions in the row: 0-63, 64-127, 128-255 and so on."""
        edges = [bucket(position) for position in self._positions]
        return {f"{low}-{high}": found for (low, high), found in self._groups(edges).items()}

    def by_class(self, kind: Callable[[int, int], str], order: Sequence[str]) -> dict[str, dict[str, float]]:
        """The same in short for classes of the token that follows: `kind(token before, token)`, in this order."""
        pairs = list(zip(self._before, self._tokens, strict=True))
        known = {pair: kind(*pair) for pair in set(pairs)}
        groups = self._groups([known[pair] for pair in pairs])
        return {name: groups[name] for name in order if name in groups}

    def _groups(self, names: Sequence[Any]) -> dict[Any, dict[str, float]]:
        import numpy as np

        arrays = [np.array(values) for values in (self._kld, self._wanted, self._found, self._agree)]
        members: dict[Any, list[int]] = {}
        for index, name in enumerate(names):
            members.setdefault(name, []).append(index)
        return {name: _short(*(values[members[name]] for values in arrays)) for name in sorted(members)}


def bucket(position: int) -> tuple[int, int]:
    """The range of positions, first and last, that a position is counted in."""
    low, high = 0, _FIRST_BUCKET
    while position >= high:
        low, high = high, 2 * high
    return low, high - 1


def _short(kld: np.ndarray, wanted: np.ndarray, found: np.ndarray, agree: np.ndarray) -> dict[str, float]:
    return {
        "tokens": len(kld),
        "kld_mean": float(kld.mean()),
        "kld_max": float(kld.max()),
        "top1_agreement": float(agree.mean()),
        "perplexity_ratio": _exp(float((wanted - found).mean())),
    }


def _likeliest(scores: torch.Tensor) -> list[tuple[int, float]]:
    values, ids = scores.topk(min(_SHOWN, len(scores)))
    return list(zip(ids.tolist(), values.exp().tolist(), strict=True))


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))
