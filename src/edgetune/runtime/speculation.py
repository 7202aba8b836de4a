"""Guessing ahead: what followed the last tokens earlier in the text is read in one go, and kept as far as it is right.

Prompt lookup decoding (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding) with the greedy check of
speculative decoding (Leviathan et al. 2023, https://arxiv.org/abs/2211.17192). A guess costs more than a step and is
often wrong, so an account is kept: what wrong guesses cost may not exceed a thirty-sixth of the answer so far. All decisions
follow from tokens and from costs that were measured before, none from the clock: the same prompt gives the same answer.

Kernels round a row among several otherwise than alone, so an answer may differ from that of plain decoding where two
tokens are about as likely; `exact` leaves guessing out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from edgetune.runtime.artifact import Artifact

MOST_ROWS = 16  # positions that a graph gives the likeliest tokens of in one go
ROW_TOKENS = "row_tokens"  # the output that has them; export/quantize/rows.py puts it into graphs
_ORDERS = (4, 3, 2)  # how many of the last tokens a guess is concluded from, the surest first
_PLACES, _LONGEST = 16, 12  # of a pair's places those that are looked at, and tokens that are compared there
_PRIOR = {4: (8.0, 1.5), 3: (5.0, 2.5), 2: (2.0, 4.0)}  # right and wrong guesses that each begins with
_FADE = 0.92  # of the counts, a guess
_WORTH = 1.05  # how much faster than plain steps a guess has to promise to be
_LOSS = 0.028  # the account: what may be lost, in steps, of each token so far; 1 / 1.028 is over 0.97
_MOST_CREDIT = 6.0  # steps; what copying gained is not lost again on open writing
# Steps that reading so many rows at once takes, where nobody has measured: `edgetune tune` does.
DEFAULT_COSTS = {1: 1.0, 2: 1.25, 4: 1.5, 8: 2.1, 16: 3.4}


@dataclass
class Counts:
    """What guessing came to: tokens that were guessed, those of them that were right, and steps with a guess."""

    drafted: int = 0
    accepted: int = 0
    guesses: int = 0


class Lookup:
    """Where each pair of tokens stood, and so what followed it."""

    def __init__(self, ids: Sequence[int] = ()) -> None:
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], deque[int]] = {}
        for token in ids:
            self.feed(token)

    def feed(self, token: int) -> None:
        """Add the text's next token."""
        if self._ids:
            self._after.setdefault((self._ids[-1], token), deque(maxlen=_PLACES)).append(len(self._ids) + 1)
        self._ids.append(token)

    def guess(self, most: int) -> tuple[list[int], int]:
        """Up to `most` tokens that may come next, and how many of the last tokens they are concluded from, at most four; [] and 0.

        Of the places where the last two tokens stood before, that counts before which most tokens are those before here, and of
        several the last one.
        """
        best, length = 0, 0
        for at in reversed(self._after.get(tuple(self._ids[-2:]), ())):
            if at < len(self._ids) and (common := self._common(at)) > length:
                best, length = at, common
        if not length:
            return [], 0
        found: list[int] = []
        while len(found) < most:  # what is guessed may repeat itself
            found.append(self._ids[best] if best < len(self._ids) else found[best - len(self._ids)])
            best += 1
        return found, min(length, _ORDERS[0])

    def _common(self, at: int) -> int:
        """How many tokens before a place are those before the end, two at least."""
        ids, count = self._ids, 2
        while count < min(_LONGEST, at) and ids[at - count - 1] == ids[-count - 1]:
            count += 1
        return count


class Policy:
    """How many tokens to guess: as many as the last guesses and the costs speak for, and the account allows.

    Args:
        costs: steps that reading 1, 2, … rows at once takes; what lies between is interpolated.
        always: guess whenever there is something to guess, as long as may be.
    """

    def __init__(self, costs: dict[int, float], *, always: bool = False) -> None:
        self._cost = [0.0, *(_between(costs, rows) for rows in range(1, MOST_ROWS + 1))]
        self._always = always
        self._right = {order: right for order, (right, _) in _PRIOR.items()}
        self._wrong = {order: wrong for order, (_, wrong) in _PRIOR.items()}
        self._balance, self._tokens = 0.0, 0

    def cost(self, rows: int) -> float:
        """Steps that reading so many rows at once takes."""
        return self._cost[rows]

    def width(self, order: int, most: int) -> int:
        """How many tokens to guess from the last `order` ones, at most `most`; 0: none."""
        if self._always or most < 1:
            return max(most, 0)
        share = self._right[order] / (self._right[order] + self._wrong[order])
        allowed = _LOSS * (self._tokens + 1) + self._balance  # whatever is guessed, this step gives a token
        best, rate, gain = 0, _WORTH, 0.0
        for width in range(1, most + 1):
            if self.cost(width + 1) - 1 > allowed:
                break
            gain += share**width
            if (1 + gain) / self.cost(width + 1) > rate:
                best, rate = width, (1 + gain) / self.cost(width + 1)
        return best

    def plain(self) -> None:
        """A step without a guess was made."""
        self._tokens += 1

    def guessed(self, order: int, drafted: int, accepted: int) -> None:
        """A step with a guess was made, of which `accepted` tokens were right."""
        self._right[order] = self._right[order] * _FADE + accepted
        self._wrong[order] = self._wrong[order] * _FADE + (accepted < drafted)
        self._tokens += accepted + 1
        self._balance = min(self._balance + accepted + 1 - self.cost(drafted + 1), _MOST_CREDIT)


def row_reader(generator: Any, artifact: Artifact) -> Callable[[list[int]], Sequence[int]] | None:
    """What `guessing` reads with, from a native generator that has read something; None where the graph cannot tell
    more than the last position's next token."""
    if not artifact.last_logits_only:
        return lambda tokens: _read(generator, tokens, "logits").argmax(axis=-1).tolist()
    try:
        generator.get_output(ROW_TOKENS)
    except RuntimeError:  # an older export, or a graph of someone else's
        return None
    return lambda tokens: _read(generator, tokens, ROW_TOKENS).tolist()


def _read(generator: Any, tokens: list[int], output: str) -> Any:
    generator.append_tokens(tokens)
    return generator.get_output(output)[0]


def _between(costs: dict[int, float], rows: int) -> float:
    known = sorted(costs)
    low = max((count for count in known if count <= rows), default=known[0])
    high = min((count for count in known if count >= rows), default=known[-1])
    if low == high:
        return costs[low]
    return costs[low] + (costs[high] - costs[low]) * (rows - low) / (high - low)


def guessing(
    read: Callable[[list[int]], Sequence[int]],
    rewind: Callable[[int], None],
    ids: Sequence[int],
    first: int,
    policy: Policy,
    limit: int,
    counts: Counts,
) -> Iterator[tuple[int, ...]]:
    """The tokens of an answer, one or several a step; the caller stops it.

    Args:
        read: reads tokens behind what is read already, and gives the likeliest next token after each of them.
        rewind: cuts what is read back to so many tokens.
        ids: the prompt, which is read.
        first: the answer's first token, which is not read yet.
        policy: how many tokens to guess.
        limit: most tokens of the answer.
        counts: kept up to date.
    """
    lookup = Lookup(ids)
    lookup.feed(first)
    yield (first,)
    token, made, length = first, 1, len(ids)
    while True:
        most = min(MOST_ROWS - 1, limit - made - 1)
        draft, order = lookup.guess(most) if most > 0 else ([], 0)
        draft = draft[: policy.width(order, len(draft))] if draft else []
        after = read([token, *draft])
        right = next((place for place, guess in enumerate(draft) if after[place] != guess), len(draft))
        if draft:
            policy.guessed(order, len(draft), right)
            counts.guesses, counts.drafted = counts.guesses + 1, counts.drafted + len(draft)
            counts.accepted += right
            if right < len(draft):
                rewind(length + 1 + right)
        else:
            policy.plain()
        found = (*draft[:right], int(after[right]))
        length, made, token = length + 1 + right, made + len(found), found[-1]
        for each in found:
            lookup.feed(each)
        yield found
