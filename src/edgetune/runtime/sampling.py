"""Which token comes next, from its logits.

ONNX Runtime GenAI draws too, but lacks min-p, bias, presence and frequency penalties, and log-probabilities, and
applies what it has in an order of its own. So whatever is not plain greedy search is done here, in this order:

1. repetition penalty (Keskar et al. 2019, CTRL): the logit of a token of prompt or answer is divided by it where it is
   positive, multiplied where it is negative;
2. presence and frequency penalties (OpenAI's API reference): off the logit of each token of the answer come the first
   once, and the second as often as it occurs there;
3. bias: added to the logit;
4. temperature: logits are divided by it; at 0 the largest one is taken, and steps 5 to 7 do not count;
5. top-k: the k largest remain, of equal ones those with smaller ids;
6. top-p (Holtzman et al. 2020): of what remains, the fewest likeliest that together have at least this share of the
   probability, of equal ones those with smaller ids first;
7. min-p (Nguyen et al. 2024): of these, those with at least this share of the likeliest one's probability.

One token is drawn from what is left, by its probabilities, with the Gumbel-max trick: each logit plus noise of its own,
and the largest sum wins. Thereby a constraint can be applied after the noise: it draws from the remaining tokens that
it allows. Where it allows none of them, the likeliest token that it allows is taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgetune.runtime.options import GenerationOptions

# Below any score that is drawn, and above the lowest float32, which is what a constraint gives to what it leaves out.
_FAR = 1e30
_FIRST_GUESS = 256  # tokens that are sorted before it is known how many top-p needs


class Sampler:
    """Chooses the tokens of one answer.

    Args:
        options: how.
        prompt: token ids before the answer.
    """

    def __init__(self, options: GenerationOptions, prompt: Sequence[int]) -> None:
        self._options = options
        self._random = np.random.default_rng(options.seed)
        self._seen = np.unique(np.asarray(prompt, np.int64)) if options.repetition_penalty != 1 else _none()
        self._answer, self._counts = _none(), np.zeros(0, np.float32)
        self._biased = np.array(list(options.logit_bias), np.int64)
        self._bias = np.array(list(options.logit_bias.values()), np.float32)

    def scores(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """What the next token is the largest of, with or without a constraint that leaves some out.

        Args:
            logits: of the vocabulary, one dimension; is overwritten.
        """
        options = self._options
        penalize(logits, options, self._seen, self._answer, self._counts)
        if self._biased.size:
            logits[self._biased] += self._bias
        if options.temperature == 0:
            return logits
        kept = keep(logits, options)
        # Relative to the largest, in double precision: a small temperature must not overflow.
        noisy = (logits[kept].astype(np.float64) - float(logits.max())) / options.temperature
        noisy -= np.log(self._random.standard_exponential(kept.size))
        if kept.size < logits.size:  # the left-out ones: below the kept ones, in their own order
            logits -= logits.max()
            logits *= _FAR / 1000
            logits -= _FAR
        logits[kept] = np.maximum(noisy, -_FAR / 2)
        return logits

    def took(self, token: int) -> None:
        """Tell it which token came."""
        if self._options.repetition_penalty != 1 and token not in self._seen:
            self._seen = np.append(self._seen, token)
        if self._options.presence_penalty or self._options.frequency_penalty:
            place = np.flatnonzero(self._answer == token)
            if place.size:
                self._counts[place] += 1
            else:
                self._answer, self._counts = np.append(self._answer, token), np.append(self._counts, np.float32(1))


def penalize(
    logits: NDArray[np.float32],
    options: GenerationOptions,
    seen: NDArray[np.int64],
    answer: NDArray[np.int64],
    counts: NDArray[np.float32],
) -> None:
    """Apply the penalties in place: `seen` are the tokens of prompt and answer, `counts` how often `answer` occur."""
    if options.repetition_penalty != 1 and seen.size:
        old = logits[seen]
        logits[seen] = np.where(old > 0, old / options.repetition_penalty, old * options.repetition_penalty)
    if answer.size:
        logits[answer] -= options.presence_penalty + options.frequency_penalty * counts


def keep(logits: NDArray[np.float32], options: GenerationOptions) -> NDArray[np.int64]:
    """Ids that top-k, top-p and min-p leave, in no order that counts."""
    size, k = logits.size, options.top_k or logits.size
    whole = k >= size and options.top_p == 1
    if whole and options.min_p == 0:
        return np.arange(size)
    cut = float(logits.max()) + options.temperature * math.log(options.min_p) if options.min_p > 0 else -math.inf
    if whole:
        return np.flatnonzero(logits >= cut)
    if options.top_p == 1:
        kept = _largest(logits, k)
    else:
        kept = _nucleus(logits, min(k, size), options)
    return kept[logits[kept] >= cut]


def _nucleus(logits: NDArray[np.float32], k: int, options: GenerationOptions) -> NDArray[np.int64]:
    """Top-p of the k largest."""
    top = float(logits.max())
    among = k if k < logits.size else 0
    total = 0.0 if among else float(np.exp((logits.astype(np.float64) - top) / options.temperature).sum())
    count = among or min(_FIRST_GUESS, logits.size)
    while True:
        best = _largest(logits, count)
        best = best[np.argsort(-logits[best], kind="stable")]
        reached = np.cumsum(np.exp((logits[best].astype(np.float64) - top) / options.temperature))
        needed = options.top_p * (reached[-1] if among else total)
        if reached[-1] >= needed or count == logits.size:
            return best[: int(np.searchsorted(reached, needed)) + 1]
        count = min(count * 4, logits.size)


def _largest(logits: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Ids of the k largest, ascending; of equal ones those with smaller ids."""
    if k >= logits.size:
        return np.arange(logits.size)
    border = np.partition(logits, logits.size - k)[logits.size - k]
    over, level = np.flatnonzero(logits > border), np.flatnonzero(logits == border)
    return np.sort(np.concatenate([over, level[: k - over.size]]))


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Natural log-probabilities along the last axis."""
    top = logits.max(axis=-1, keepdims=True)
    return logits - (
        top + np.log(np.exp(logits - top).sum(axis=-1, keepdims=True, dtype=np.float64)).astype(np.float32)
    )


def likeliest(logprobs: NDArray[np.float32], count: int) -> list[int]:
    """Ids of the `count` largest, best first; of equal ones those with smaller ids first."""
    best = _largest(logprobs, count) if count else _none()
    return [int(token) for token in best[np.argsort(-logprobs[best], kind="stable")]]


def _none() -> NDArray[np.int64]:
    return np.zeros(0, np.int64)
