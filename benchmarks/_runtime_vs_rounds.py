"""The measurements of `runtime_vs.py`: every engine in turn, round by round, on the same prompts."""

from __future__ import annotations

import contextlib
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _runtime_vs_process import Engine, Entry

from edgetune.errors import EdgetuneError
from edgetune.runtime.bench.process import drop_from_cache, stress
from edgetune.runtime.bench.prompts import distinct_prompts
from edgetune.runtime.bench.watch import Meter

_REST_S = 0.3  # between turns: what spins after its work has stopped by then
BUSY = (32, 12)  # tokens of a round beside busy programs: some engines then take seconds a token


@dataclass
class Measured:
    """What an entry's rounds gave.

    Attributes:
        facts: version and threads.
        prefill, decode: tokens/s of each round. Prefill: prompt tokens over the time to the first new one; decode: tokens
            after the first over their time.
        quiet, busy: decode tokens/s of short rounds, alone and beside busy programs.
        tokens: of each round.
        memory: peak_rss_mb, rss_mb, pss_mb after the quiet rounds.
        cold_s, warm_s: seconds of loading in fresh processes, the engine's import left out; import_s: that.
        others: cores that other programs kept busy, at most.
        failed: why there is nothing.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    quiet: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    memory: dict[str, float] = field(default_factory=dict)
    cold_s: list[float] = field(default_factory=list)
    warm_s: list[float] = field(default_factory=list)
    import_s: list[float] = field(default_factory=list)
    others: float | None = None
    failed: str | None = None


def prompts(encode: Callable[[str], list[int]], texts: Sequence[str], length: int, rounds: int) -> list[list[int]]:
    """One warm-up and `rounds` prompts of `length` tokens, no two alike: drawn words and real text in turn."""
    words = [ids for _, ids in distinct_prompts(encode, length, 1, rounds)]
    real = encode("\n".join(texts))
    if len(real) <= length + rounds:
        return words
    starts = random.Random(length).sample(range(len(real) - length), rounds)
    drawn = [real[start : start + length] for start in starts]
    return [words[0], *(drawn[n] if n % 2 else words[n + 1] for n in range(rounds))]


def take_turns(entries: Sequence[Entry], asked: Sequence[list[int]], new: int, stressed: int) -> dict[str, Measured]:
    """Measure every entry on the same prompts, in turn, each round in another order. One works at a time.

    Args:
        entries: each is a process; all stay alive.
        asked: prompts, the first of which is a warm-up.
        new: tokens of an answer.
        stressed: busy programs beside some short rounds at the end; 0 leaves those out.
    """
    found = {entry.name: Measured() for entry in entries}
    with contextlib.ExitStack() as stack:
        engines: list[Engine] = []
        for entry in entries:
            with _kept(found[entry.name]):
                engine = stack.enter_context(Engine(entry, len(asked[0]) + new))
                found[entry.name].facts = engine.facts["opened"]
                engine.generate(asked[0], new)
                engines.append(engine)
        meters = {engine.pid: Meter([engine.pid, os.getpid()]) for engine in engines}
        for number, ids in enumerate(asked[1:]):
            for engine in _order(engines, number):
                mine = found[engine.entry.name]
                time.sleep(_REST_S)
                with _kept(mine), meters[engine.pid].round():
                    answer = engine.generate(ids, new)
                    mine.prefill.append(len(ids) / answer["ttft_ms"] * 1e3)
                    mine.decode.append(_decode(answer))
                    mine.tokens.append(answer["tokens"])
                    mine.memory = engine.memory
            _say(f"round {number + 1} of {len(asked) - 1}")
        for engine in engines:
            found[engine.entry.name].others = meters[engine.pid].result()["others_busy_cores"]
        if stressed:
            _beside_others(engines, asked[1:], stressed, found)
    return found


def _beside_others(
    engines: list[Engine], asked: Sequence[list[int]], stressed: int, found: dict[str, Measured]
) -> None:
    for number, ids in enumerate(asked):
        for engine in _order(engines, number):
            mine, short = found[engine.entry.name], ids[-BUSY[0] :]  # a beginning that no cache has
            time.sleep(_REST_S)
            with _kept(mine):
                mine.quiet.append(_decode(engine.generate(short, BUSY[1])))
                with stress(stressed):
                    mine.busy.append(_decode(engine.generate(short[::-1], BUSY[1])))
        _say(f"round {number + 1} of {len(asked)} beside {stressed} busy programs")


def load_times(entries: Sequence[Entry], found: dict[str, Measured], context: int, times: int) -> str | None:
    """Load each entry in fresh processes, in turn: with its files out of the page cache, and in it.

    Returns:
        Why cold loads could not be measured, or None.
    """
    note = None
    for _ in range(times):
        for entry in entries:
            mine, path = found[entry.name], Path(entry.model)
            files = sorted(path.iterdir()) if path.is_dir() else [path]
            if mine.failed:
                continue
            dropped = drop_from_cache([file for file in files if file.is_file()])
            note = note or dropped
            for kept in (mine.cold_s, mine.warm_s):
                if kept is mine.cold_s and dropped:
                    continue
                with _kept(mine), Engine(entry, context) as engine:
                    kept.append(engine.facts["load_s"])
                    mine.import_s.append(engine.facts["import_s"])
    return note


@contextlib.contextmanager
def _kept(mine: Measured) -> Any:
    """Note what an engine fails at; the others go on."""
    try:
        yield
    except EdgetuneError as error:
        mine.failed = str(error)
        _say(f"failed: {error}")


def _order(engines: list[Engine], number: int) -> list[Engine]:
    first = number % len(engines) if engines else 0
    turned = engines[first:] + engines[:first]
    return turned if number % 2 else turned[::-1]


def _decode(answer: dict[str, Any]) -> float:
    return len(answer["itl_ms"]) / sum(answer["itl_ms"]) * 1e3


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)
