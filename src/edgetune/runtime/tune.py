"""Which settings run an artifact fastest on this machine: tried one after the other, each beside the best so far.

Both run in processes of their own and answer the same prompts in turn, so that what else the machine does meets both.
A setting is kept when it is better beyond the noise and gives the same tokens. Devices are seldom quiet, so settings
of threads are measured once more with a busy program on every core, and count by both.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from edgetune import progress
from edgetune.errors import EdgetuneError, InputError
from edgetune.runtime.artifact import Artifact
from edgetune.runtime.bench.process import Job, Worker, stress
from edgetune.runtime.bench.workloads import Workload
from edgetune.runtime.hardware import checked_threads, cpu, hardware
from edgetune.runtime.profile import Profile, Settings, artifact_digest, engine

SECONDS = 110.0  # all of it, by default
_QUIET = (128, 48)  # tokens of a round at most: prompt and answer
_PAIRS, _LEAST_PAIRS = 6, 3
_LOADED = (32, 8)  # tokens of a round on a busy machine, where all may be twenty times slower
_STATE_S = 8.0  # for the rounds of one setting, on a quiet machine and on a busy one; two rounds are made in any case
_ROWS = (1, 2, 4, 8, 16)  # tokens that are read at once, to learn what guessing ahead costs
_COST_ROUNDS = 3
_ROUND_S = 0.5  # a round is shortened to this where the model is slow
_GAIN = 0.01  # what the quarter of rounds that speaks least for a setting must still show
_HOPELESS = 0.85  # a setting that is so much slower on a quiet machine is not tried on a busy one
_TRIALS = 0.65  # the share of the time that is for trials
_COSTS = 0.75  # and up to where reading several tokens at once is measured, which takes one round in any case


@dataclass(frozen=True)
class Trial:
    """One setting to try.

    Attributes:
        name: as people read it.
        session: session options that it sets.
        threads, prefill_tokens, huge_pages: what it sets of `Settings`, if not None.
        under_load: whether it is one for busy machines, too.
    """

    name: str
    session: tuple[tuple[str, str | bool], ...] = ()
    threads: int | None = None
    prefill_tokens: int | None = None
    huge_pages: bool | None = None
    under_load: bool = False

    def on(self, best: Settings) -> Settings:
        """`best` with this setting."""
        threads = best.threads if self.threads is None else self.threads
        tokens = best.prefill_tokens if self.prefill_tokens is None else self.prefill_tokens
        pages = best.huge_pages if self.huge_pages is None else self.huge_pages
        session = {**best.session, **dict(self.session)}
        return replace(best, threads=threads, session=session, prefill_tokens=tokens, huge_pages=pages)


def trials(artifact: Artifact) -> list[Trial]:
    """What is tried, the most promising first."""
    here, threads = cpu(), checked_threads(None)
    counts = {1, threads // 2, int(here["logical_cores"])} - {0, threads}
    spin = "session.intra_op.allow_spinning"
    found = [
        Trial("threads do not spin", ((spin, "0"),), under_load=True),
        Trial("threads spin for 50 µs", (("session.intra_op.spin_duration_us", "50"),), under_load=True),
        *(Trial(f"{count} thread{'s' * (count != 1)}", threads=count, under_load=True) for count in sorted(counts)),
        Trial("work in smaller blocks", (("session.dynamic_block_base", "4"),), under_load=True),
        *(
            Trial(f"prompts {size} tokens at a time", prefill_tokens=size)
            for size in (32, 64, 128, 256)
            if size != artifact.prefill_tokens
        ),
        Trial("no huge pages", huge_pages=False),
        Trial("no memory arena", (("enable_cpu_mem_arena", False),)),
        Trial("no memory pattern", (("enable_mem_pattern", False),)),
    ]
    if threads > 1 and hasattr(os, "sched_getaffinity"):
        own = sorted(os.sched_getaffinity(0))
        pinned = ";".join(
            str(core + 1) for core in own[1:threads]
        )  # one fewer: the caller's thread is not ONNX Runtime's
        found.append(Trial("each thread on a core", (("session.intra_op_thread_affinities", pinned),), under_load=True))
    return found


@dataclass(frozen=True)
class Ratios:
    """How a setting did beside the best so far, a factor a round: over 1 is faster."""

    prefill: list[float]
    decode: list[float]
    whole: list[float]
    same_tokens: bool

    def as_dict(self) -> dict[str, float]:
        """Medians, rounded, for a report."""
        names = ("prefill", "decode", "whole")
        return {name: round(statistics.median(getattr(self, name)), 3) for name in names} | {"rounds": len(self.whole)}


def better(quiet: Ratios, loaded: Ratios | None) -> bool:
    """Whether a setting is to be kept: faster beyond the noise, by rounds on a quiet and on a busy machine alike."""
    low = _lower_quarter(quiet.whole)
    if loaded:
        low = math.sqrt(low * _lower_quarter(loaded.whole))
    return low > 1 + _GAIN and quiet.same_tokens and (loaded is None or loaded.same_tokens)


def _lower_quarter(values: list[float]) -> float:
    return statistics.quantiles(values, n=4, method="inclusive")[0]


def tune(artifact: Artifact, seconds: float = SECONDS, under_load: bool = True) -> Profile:
    """Measure what is best here.

    Args:
        artifact: a verified artifact.
        seconds: about how long it may take; what finds no time is listed as not measured.
        under_load: measure with a busy program on every core, too.

    Returns:
        The profile, not saved yet. `measured` has `trials` (name, settings, quiet and loaded factors, kept, note),
        `before` and `after` (tokens/s quiet and loaded, peak_rss_mb), `net` (how many times as fast what was kept is in
        all, None where nothing was; at 1 or less the profile's settings are plain ones), `guessing` (see
        `_Work.row_costs`), `seconds`, `round` (tokens, on a quiet and on a busy machine) and `busy_programs`.

    Raises:
        InputError: the artifact cannot run here, or there is no memory for two of it.
        EdgetuneError: the measuring process died with the settings that every session begins with.
    """
    work = _Work(artifact, seconds, under_load)
    plain = settings = Settings()
    todo = trials(artifact)
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack, progress.task("tuning", total=len(todo)) as shown:
        best = work.start(plain, stack)
        work.size(best)
        for trial in todo:
            row, kept = work.try_out(trial, settings, best)
            if kept is not None:
                settings, best = trial.on(settings), stack.enter_context(kept)
            rows.append(row)
            shown.advance(note=f"{trial.name}: {'kept' if row['kept'] else row.get('note', 'no better')}")
        costs, guessing = work.row_costs(best)
        before = best if settings == plain else work.start(plain, stack)
        rates, net = work.before_and_after(before, best)
        measured = {
            "trials": rows,
            "round": {"quiet": asdict(work.quiet), "loaded": asdict(work.loaded)},
            "busy_programs": work.cores if under_load else 0,
            "guessing": guessing,
            **rates,
            "net": net,
            "seconds": round(time.monotonic() - work.began, 1),
        }
    # Each was better than the best before it; whether all are better than none is another question.
    settings = replace(settings if net is None or net > 1 else plain, row_costs=costs)
    return Profile(artifact_digest(artifact), artifact.name, cpu(), engine(), settings, measured)


class _Work:
    """The measurements, and the time that is left for them."""

    def __init__(self, artifact: Artifact, seconds: float, under_load: bool) -> None:
        self.artifact, self.seconds, self.under_load = artifact, seconds, under_load
        self.began = time.monotonic()
        self.cores = max(1, int(cpu()["usable_cores"]))
        new = max(2, min(_QUIET[1], artifact.max_length // 3))
        prompt = max(1, min(_QUIET[0], artifact.max_length - new))
        self.quiet = Workload("drawn", prompt, new)
        self._shorten(1.0)
        self._next = 0

    def _shorten(self, share: float) -> None:
        prompt, new = max(16, int(self.quiet.prompt * share)), max(8, int(self.quiet.new * share))
        self.quiet = Workload("drawn", min(self.quiet.prompt, prompt), min(self.quiet.new, new))
        self.loaded = Workload("drawn", min(self.quiet.prompt, _LOADED[0]), min(self.quiet.new, _LOADED[1]))

    def over(self, share: float = _TRIALS) -> bool:
        """Whether this share of the time is up; that for trials when not given."""
        return self._left(share) < 0

    def _left(self, share: float) -> float:
        return share * self.seconds - (time.monotonic() - self.began)

    def start(self, settings: Settings, stack: contextlib.ExitStack) -> Worker:
        """A process with the artifact, warm by one round, that ends with `stack`."""
        own = (settings.threads, None, False, settings.session, settings.prefill_tokens, False, settings.huge_pages)
        worker = stack.enter_context(Worker(Job(self.artifact.path, *own)))
        worker.opened()
        worker.prepare(self.loaded, 1, 0)
        worker.round(0)
        return worker

    def size(self, worker: Worker) -> None:
        """Shorten the rounds where the model is slow. Raises InputError where memory would not hold it twice."""
        worker.prepare(self.loaded, 0, 1)
        times = (self.quiet.prompt + self.quiet.new) / (self.loaded.prompt + self.loaded.new)
        guess = times * _whole(worker.round(0)) / 1e3
        self._shorten(min(1.0, 10 * _ROUND_S / guess))  # one whole round may take half of the time already
        worker.prepare(self.quiet, 0, 1)
        whole = _whole(worker.round(0)) / 1e3
        needed, free = worker.peak_rss_mb, hardware()["memory"]["available_mb"]
        if needed > 0.9 * free:
            raise InputError(
                f"two of it are measured beside each other: {needed:,.0f} MB more are needed, {free:,.0f} MB are free",
                where=self.artifact.path,
                fix="close other programs",
            )
        self._shorten(min(1.0, _ROUND_S / whole))

    def try_out(self, trial: Trial, settings: Settings, best: Worker) -> tuple[dict[str, Any], Worker | None]:
        """Measure a trial. Returns its row, and its process, which the caller ends, if it is to be kept."""
        row: dict[str, Any] = {"name": trial.name, "settings": asdict(trial.on(settings)), "kept": False}
        if self.over():
            return {**row, "note": "not measured: the time was up"}, None
        with contextlib.ExitStack() as stack:
            try:
                other = self.start(trial.on(settings), stack)
                quiet, loaded = self._compare(best, other, trial.under_load)
            except EdgetuneError as error:
                return {**row, "note": f"does not run here: {error.what}"}, None
            row |= {"quiet": quiet.as_dict(), "loaded": loaded.as_dict() if loaded else None}
            if not (quiet.same_tokens and (loaded is None or loaded.same_tokens)):
                return {**row, "note": "gives other tokens"}, None
            if not better(quiet, loaded):
                return row, None
            stack.pop_all()
            return {**row, "kept": True}, other

    def _compare(self, best: Worker, other: Worker, under_load: bool) -> tuple[Ratios, Ratios | None]:
        """Rounds of both in turn; those under load only where they can matter."""
        quiet, middle = Ratios([], [], [], True), 1.0
        self._prepare(self.quiet, best, other)
        end = time.monotonic() + min(_STATE_S, self._left(_COSTS))
        for number in range(_PAIRS):
            quiet = self._pair(best, other, quiet, number)
            middle = statistics.median(quiet.whole)
            known = number + 1 >= _LEAST_PAIRS and (middle < 1 - _GAIN or not quiet.same_tokens)
            if known or (number and time.monotonic() > end):
                break
        if not (under_load and self.under_load and quiet.same_tokens and middle > _HOPELESS):
            return quiet, None
        loaded, end = Ratios([], [], [], True), time.monotonic() + min(_STATE_S, self._left(_COSTS))
        self._prepare(self.loaded, best, other)
        with stress(self.cores):
            for number in range(_PAIRS):
                loaded = self._pair(best, other, loaded, number)
                if number and time.monotonic() > end:
                    break
        return quiet, loaded

    def _prepare(self, work: Workload, *workers: Worker) -> None:
        for worker in workers:
            worker.prepare(work, 0, _PAIRS)

    def _pair(self, best: Worker, other: Worker, found: Ratios, number: int) -> Ratios:
        """`found` with one more round of both, on the same prompt."""
        first, second = (best, other) if number % 2 else (other, best)
        one, two = first.round(number), second.round(number)
        old, new = (one, two) if first is best else (two, one)
        return Ratios(
            [*found.prefill, old[0]["ttft_ms"] / new[0]["ttft_ms"]],
            [*found.decode, sum(old[0]["itl_ms"]) / sum(new[0]["itl_ms"])],
            [*found.whole, _whole(old) / _whole(new)],
            found.same_tokens and old[0]["tokens"] == new[0]["tokens"],
        )

    def row_costs(self, best: Worker) -> tuple[dict[int, float] | None, dict[str, int] | None]:
        """What reading several tokens at once costs, in steps, and how many of how many next tokens it changes."""
        room = self.artifact.max_length - 2 * _ROWS[-1] - 1
        new = min(max(self.quiet.new, _ROWS[-1]), room // 2)
        if new < _ROWS[-1]:
            return None, None
        self._prepare(Workload("drawn", min(self.quiet.prompt, room - new), new), best)
        found = []
        for number in range(_COST_ROUNDS):
            if number and self.over(_COSTS):
                break
            entry = best.rows(number, _ROWS)
            if entry is None:
                return None, None
            found.append(entry)
        times = [min(ms) for ms in zip(*(entry["ms"] for entry in found), strict=True)]
        costs = {count: round(ms / times[0], 3) for count, ms in zip(_ROWS, times, strict=True)}
        return costs, {name: sum(entry[name] for entry in found) for name in ("differ", "of")}

    def before_and_after(self, before: Worker, after: Worker) -> tuple[dict[str, Any], float | None]:
        """Rates of both, measured in turn, on a quiet and on a busy machine, and how many times as fast the second is.

        Args:
            after: the same as `before` where no setting was kept; it is measured once then, and no factor told.
        """
        found: dict[str, Any] = {"before": {}, "after": {}}
        both = {"before": before} if before is after else {"before": before, "after": after}
        factors = []
        states = [("quiet", 0, self.quiet), ("loaded", self.cores, self.loaded)][: 1 + self.under_load]
        for number, (state, load, work) in enumerate(states):
            left = self._left(1.0) / (len(states) - number)
            made = self._in_turn(both, work, load, min(_STATE_S, left))
            for name, samples in made.items():
                prefill = statistics.median(work.prompt / entry["ttft_ms"] * 1e3 for entry in samples)
                decode = statistics.median((work.new - 1) / sum(entry["itl_ms"]) * 1e3 for entry in samples)
                found[name][state] = {
                    "prefill_tokens_per_s": round(prefill, 1),
                    "decode_tokens_per_s": round(decode, 1),
                }
                found[name].setdefault("peak_rss_mb", both[name].peak_rss_mb)
            if before is not after:
                pairs = zip(made["before"], made["after"], strict=True)
                factors.append(statistics.median(_whole([old]) / _whole([new]) for old, new in pairs))
        if before is after:
            return {**found, "after": found["before"]}, None
        return found, round(statistics.geometric_mean(factors), 3)

    def _in_turn(
        self, workers: dict[str, Worker], work: Workload, load: int, seconds: float
    ) -> dict[str, list[dict[str, Any]]]:
        """Samples of each worker by its name, over rounds that take about so long; one is made in any case."""
        self._prepare(work, *workers.values())
        made: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
        end = time.monotonic() + seconds
        with stress(load):
            for number in range(_PAIRS):
                if number and time.monotonic() > end:
                    break
                for name, worker in workers.items():
                    made[name] += worker.round(number)
        return made


def _whole(samples: list[dict[str, Any]]) -> float:
    return float(samples[0]["ttft_ms"] + sum(samples[0]["itl_ms"]))
