"""Clients that ask services at once, and services that are asked in turn."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgetune import progress
from edgetune.errors import EdgetuneError
from edgetune.runtime.bench.client import Answer, Service, ask, not_taken, refusal
from edgetune.runtime.bench.prompts import Conversation, read_prompts, talks, words_prompt
from edgetune.runtime.bench.watch import Meter
from edgetune.runtime.bench.workloads import Workload


@dataclass(frozen=True)
class Reply:
    """An answer, and what it was asked for by.

    Attributes:
        client: which of those that asked at once, from 1.
        turn: of the client's round, from 1.
        messages: the whole conversation before it.
        refused: a later turn that the service did not take, as it does where its context is full: no fault, but an end.
    """

    client: int
    turn: int
    messages: Conversation
    answer: Answer
    refused: bool = False


@dataclass
class Level:
    """One workload, asked for by so many clients at once.

    Attributes:
        rounds: the replies of each round, by client and turn, without those that were refused.
        refused: how the service refused later turns.
        wall_s: seconds in all.
        meter: of `Meter.result`.
    """

    work: Workload
    clients: int
    rounds: list[list[Reply]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    wall_s: float = 0.0
    meter: dict[str, Any] = field(default_factory=dict)


class Talks:
    """What the clients of a workload say; the same at every call, and in no two rounds alike but for your own prompts."""

    def __init__(self, work: Workload) -> None:
        self.work = work
        self.new = max(work.new, 1)
        self._own = None if work.file is None else read_prompts(Path(work.file))

    def of(self, client: int, clients: int, number: int) -> list[list[Conversation]]:
        """The conversations of one client's round, each a list of turns; clients and rounds count from 0."""
        name = f"{clients} clients, client {client}, round {number}"
        if self.work.kind == "drawn":
            return [[self._drawn(name)]]
        own = self._own and (self._own[client::clients] or [self._own[client % len(self._own)]])
        return [
            [[{"role": "user", "content": turn}] if isinstance(turn, str) else turn for turn in talk]
            for talk in talks(self.work.kind, name, own)
        ]

    def warmup(self, number: int) -> Conversation:
        """A prompt like those of the workload, and none of them."""
        name = f"warm-up {number}"
        if self.work.kind == "drawn":
            return self._drawn(name)
        turn = talks("copy" if self.work.kind == "copy" else "chat", name)[0][0]
        assert not isinstance(turn, str)
        return turn

    def _drawn(self, name: str) -> Conversation:
        return [{"role": "user", "content": words_prompt(name, max(self.work.prompt, self.work.depth, 1))}]

    def requests(self, clients: int) -> int:
        """How many a round has at most."""
        return sum(len(talk) for client in range(clients) for talk in self.of(client, clients, 0))


def take_turns(
    services: Sequence[tuple[Service, int | None]], asked: Talks, clients: int, repetitions: int, shown: progress.Task
) -> list[Level]:
    """Ask services for the same rounds. One alone is asked without a pause between rounds, several round by round in turn.

    Args:
        services: each with its process, where that is known.

    Raises:
        DoesNotFit: one of them refused all of it.
        EdgetuneError: one of them answered nothing.
    """
    levels = [Level(asked.work, clients) for _ in services]
    meters = [Meter([os.getpid(), *([pid] if pid else [])]) for _, pid in services]
    bursts = [range(repetitions)] if len(services) == 1 else [range(n, n + 1) for n in range(repetitions)]
    for number, rounds in enumerate(bursts):
        first = number % len(services)
        for index in [*range(first, len(services)), *range(first)]:
            with meters[index].round():
                start = time.perf_counter()
                came = _burst(services[index][0], asked, clients, rounds, shown)
                levels[index].wall_s += time.perf_counter() - start
            levels[index].rounds += [[reply for reply in part if not reply.refused] for part in came]
            levels[index].refused += [reply.answer.error or "" for part in came for reply in part if reply.refused]
    for (service, pid), level, meter in zip(services, levels, meters, strict=True):
        replies = [reply for part in level.rounds for reply in part]
        if all(not_taken(reply.answer) for reply in replies):
            raise refusal(service, replies[0].answer, asked.work.name)
        if all(reply.answer.error for reply in replies):
            what = f"no request of {clients} at once was answered: {replies[0].answer.error}"
            raise EdgetuneError(what, where=service.base)
        level.meter = meter.result() if pid else {**meter.result(), "others_busy_cores": None}
    return levels


def _burst(service: Service, asked: Talks, clients: int, rounds: range, shown: progress.Task) -> list[list[Reply]]:
    """So many clients at once, each on its own from round to round. Returns the replies of each round."""
    done: queue.Queue[tuple[int, Reply | None]] = queue.Queue()  # None: a client has ended
    together, stop = threading.Barrier(clients), threading.Event()

    def client(index: int) -> None:
        together.wait()
        try:
            for number in rounds:
                for reply in _asked(service, asked, (index, clients, number)):
                    done.put((number, reply))
                    if stop.is_set():
                        return
        finally:
            done.put((0, None))

    found: dict[int, list[Reply]] = {number: [] for number in rounds}
    for index in range(clients):
        threading.Thread(target=client, args=(index,), daemon=True).start()
    left = clients
    try:
        while left:
            number, reply = done.get()
            if reply is None:
                left -= 1
            else:
                found[number].append(reply)
                shown.advance(note=f"{asked.work.name}, {clients} at once")
    finally:
        stop.set()
    # by client and turn, not in the order of their ends
    return [sorted(part, key=lambda reply: (reply.client, reply.turn)) for part in found.values()]


def _asked(service: Service, asked: Talks, which: tuple[int, int, int]) -> Iterator[Reply]:
    """A client's round, as it goes. A conversation ends with an answer that fails."""
    turn = 0
    for talk in asked.of(*which):
        said: Conversation = []
        for messages in talk:
            said, turn = [*said, *messages], turn + 1
            answer = ask(service, said, asked.new)
            later = len(said) > len(messages)
            yield Reply(which[0] + 1, turn, said, answer, later and not_taken(answer))
            if answer.error:
                break
            said = [*said, {"role": "assistant", "content": answer.text}]
