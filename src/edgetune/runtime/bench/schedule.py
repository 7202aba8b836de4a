"""Rounds in turn: several processes alive, one working at a time, so that what drifts on a machine meets all alike."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from edgetune import progress
from edgetune.runtime.bench.process import Job, Worker, stress
from edgetune.runtime.bench.watch import MemoryCurve, Meter
from edgetune.runtime.bench.workloads import DoesNotFit, Workload

Rounds = list[list[dict[str, Any]]]


@dataclass
class Measured:
    """What one workload gave.

    Attributes:
        rounds: the samples of each counted round.
        quiet: those of the rounds without the busy processes beside; empty where there were none.
        meter: of `Meter.result`, over the counted rounds; what others did over the quiet ones, too.
        peak_rss_mb, peak_pss_mb: of the process during this workload, loading included for the first one.
    """

    work: Workload
    rounds: Rounds = field(default_factory=list)
    quiet: Rounds = field(default_factory=list)
    meter: dict[str, Any] = field(default_factory=dict)
    peak_rss_mb: float = 0.0
    peak_pss_mb: float | None = None


@dataclass
class Run:
    """One way of running an artifact: its facts (of `worker.opened`), what each workload gave, its memory over time.

    missed: workloads that were left out, as one of the contexts does not hold them.
    """

    job: Job
    facts: dict[str, Any] = field(default_factory=dict)
    works: list[Measured] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)
    missed: dict[str, DoesNotFit] = field(default_factory=dict)


def take_turns(
    jobs: Sequence[Job],
    works: Callable[[int], list[Workload]],
    warmup: int,
    repetitions: int,
    busy: int = 0,
) -> list[Run]:
    """Measure every job on the same work, round by round in turn, each turn in another order.

    Args:
        jobs: each is a process; all stay alive while one works.
        works: what is measured, given the smallest of their contexts.
        busy: so many busy processes run beside every second round; the others are `quiet`.

    Raises:
        InputError, EdgetuneError: see `Worker`; nothing of it fits.
    """
    runs = [Run(job) for job in jobs]
    with progress.task("bench") as shown:
        planned: list[Workload] | None = None
        for session in (False, True):
            if planned is not None and not any(work.through_session == session for work in planned):
                continue
            if planned is None and not session and _only_sessions(works):
                continue
            planned = _phase(runs, session, works, planned, (warmup, repetitions, busy), shown)
    if not runs[0].works:
        raise next(iter(runs[0].missed.values()))
    return runs


def _only_sessions(works: Callable[[int], list[Workload]]) -> bool:
    return all(work.through_session for work in works(1 << 40))


def _phase(
    runs: list[Run],
    session: bool,
    works: Callable[[int], list[Workload]],
    planned: list[Workload] | None,
    counts: tuple[int, int, int],
    shown: progress.Task,
) -> list[Workload]:
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(Worker(replace(run.job, session=session))) for run in runs]
        curves = [MemoryCurve(worker.pid) for worker in workers]
        for worker, run, curve in zip(workers, runs, curves, strict=True):
            curve.mark("load")
            facts = worker.opened()
            run.facts = run.facts or facts
        if planned is None:
            planned = works(min(run.facts["max_length"] for run in runs))
            shown.total(len(planned) * len(runs) * (counts[0] + counts[1] * (1 + bool(counts[2]))))
        for work in planned:
            if work.through_session == session:
                _workload(workers, runs, curves, work, counts, shown)
        for run, curve in zip(runs, curves, strict=True):
            run.memory.append(curve.stop())
    return planned


def _workload(
    workers: list[Worker],
    runs: list[Run],
    curves: list[MemoryCurve],
    work: Workload,
    counts: tuple[int, int, int],
    shown: progress.Task,
) -> None:
    warmup, repetitions, busy = counts
    loaded = [0.0 if run.works else worker.peak_rss_mb for worker, run in zip(workers, runs, strict=True)]
    try:
        rounds = max(worker.prepare(work, warmup, repetitions) for worker in workers)
    except DoesNotFit as error:
        for run in runs:
            run.missed[work.name] = error
        return
    found = [Measured(work) for _ in workers]
    for curve in curves:
        curve.mark(work.name)
    for number in range(warmup):
        for worker in workers:
            worker.round(number)
            shown.advance(note=work.name)
    meters, quiet = ([Meter([worker.pid, os.getpid()]) for worker in workers] for _ in range(2))
    for number in range(warmup, rounds):
        first = number % len(workers)
        for index in [*range(first, len(workers)), *range(first)]:
            if busy:
                with quiet[index].round():
                    found[index].quiet.append(workers[index].round(number))
                shown.advance()
                with stress(busy) as pids, meters[index].round(pids):
                    found[index].rounds.append(workers[index].round(number))
            else:
                with meters[index].round():
                    found[index].rounds.append(workers[index].round(number))
            shown.advance(note=f"{work.name}{_speed(found[index].rounds[-1], work.batch)}")
    for worker, run, result, before in zip(workers, runs, found, loaded, strict=True):
        result.peak_rss_mb, result.peak_pss_mb = max(before, worker.peak_rss_mb), worker.peak_pss_mb
        run.works.append(result)
    for result, meter, other in zip(found, meters, quiet, strict=True):
        result.meter = meter.result()
        disturbed = [each["others_busy_cores"] for each in (result.meter, other.result())]
        result.meter["others_busy_cores"] = max((cores for cores in disturbed if cores is not None), default=None)


def _speed(samples: list[dict[str, Any]], batch: int) -> str:
    times = [ms for sample in samples for ms in sample["itl_ms"]]
    return f", {batch * len(times) / sum(times) * 1e3:.1f} tokens/s" if times and sum(times) else ""
