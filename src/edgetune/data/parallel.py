"""Encoding many rows: in this process while they are few, in one process a core when that is sooner done.

Rows come out in the order in which they went in, and are the same whoever encodes them: a worker builds its tokenizer
from the model's folder and is used only if the tokenizer's fingerprint is that of this process.
"""

from __future__ import annotations

import contextlib
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import IO, Any, NamedTuple, TypeVar

from edgetune.data.fingerprint import brings_code, fingerprint, folder_of
from edgetune.data.problems import RowProblem
from edgetune.data.render import Renderer, TrainOn, cut
from edgetune.errors import EdgetuneError

_COMMAND = (sys.executable, "-P", "-m", "edgetune.data.worker")
_CHUNK = 64  # rows that go to a worker at once
_CHUNK_CHARACTERS = 1_000_000
_SETTLED_S = 1.0  # after this it is judged how long the rest takes
_WORTH_S = 12.0  # that long it must take for workers to be started: each needs some 4 s of a core to start
_WORKER_MB = 500
_MOST_WORKERS = 12  # more than this process can feed

T = TypeVar("T")


class Tokens(NamedTuple):
    """An encoded row, ready to be stored.

    Attributes:
        ids: the row's tokens through the limit, unsigned little-endian, `Encoder.token_bytes` bytes each.
        learned: for each of them a byte, 1 where the loss falls.
        whole: tokens of the row before it was cut.
        learned_count: tokens that are learned, after the cut.
        notes: see `Encoded`.
    """

    ids: bytes
    learned: bytes
    whole: int
    learned_count: int
    notes: frozenset[str]


def encode_rows(
    renderer: Renderer, rows: Iterable[dict[str, Any]], train_on: TrainOn, limit: int | None, token_bytes: int
) -> list[Tokens | RowProblem]:
    """Encode rows; what cannot be is a problem in the row's place. Raises InputError for a useless chat template."""
    import numpy as np

    found: list[Tokens | RowProblem] = []
    for row in rows:
        try:
            encoded = renderer.encode(row, train_on)
        except RowProblem as problem:
            found.append(RowProblem(problem.what, problem.fix))  # without the traceback, which holds the row
            continue
        short = encoded if limit is None else cut(encoded, limit)
        ids, learned = np.asarray(short.ids, f"<u{token_bytes}").tobytes(), bytes(short.learned)
        found.append(Tokens(ids, learned, len(encoded.ids), sum(learned), encoded.notes))
    return found


class Encoder:
    """Encodes rows for one renderer. A context manager: its workers end with the block.

    Args:
        renderer: of the tokenizer.
        train_on: where the loss falls.
        limit: tokens a row is cut to; None for no limit.
        workers: processes; None decides by the work, the cores and the memory, 1 is this process only.
    """

    def __init__(self, renderer: Renderer, train_on: TrainOn, limit: int | None, workers: int | None = None) -> None:
        self.renderer, self.train_on, self.limit = renderer, train_on, limit
        self.token_bytes = 2 if renderer.vocabulary <= 1 << 16 else 4
        self._workers = workers
        self._pool = self._start(workers) if workers else None

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def encode(self, rows: Iterable[tuple[dict[str, Any], T]], count: int) -> Iterator[tuple[T, Tokens | RowProblem]]:
        """Encode rows.

        Args:
            rows: each with a mark of the caller's, which comes back with the result.
            count: about how many there are.

        Yields:
            the mark of each row, in order, and its tokens, or what is wrong with it.

        Raises:
            InputError: no row can be learned with the chat template.
            EdgetuneError: a worker ended before its time.
        """
        rows, started = iter(rows), time.monotonic()
        for done, (row, mark) in enumerate(rows, 1):  # the first row in any case: a useless template shows at once
            yield mark, self._here([row])[0]
            took = time.monotonic() - started
            if self._workers is None and took > _SETTLED_S and took / done * (count - done) > _WORTH_S:
                self._workers = most_workers()
                self._pool = self._start(self._workers)
            if self._pool is not None:
                yield from self._spread(rows, self._pool)

    def _here(self, rows: list[dict[str, Any]]) -> list[Tokens | RowProblem]:
        return encode_rows(self.renderer, rows, self.train_on, self.limit, self.token_bytes)

    def _start(self, workers: int) -> _Pool | None:
        tokenizer = self.renderer.tokenizer
        folder, known = folder_of(tokenizer), fingerprint(self.renderer)
        if workers < 2 or folder is None or known is None:
            return None
        job = {
            "folder": str(folder),
            "trust_remote_code": brings_code(tokenizer),
            "chat_template": tokenizer.chat_template,
            "stop_ids": self.renderer.stop_ids,
            "train_on": self.train_on,
            "limit": self.limit,
            "token_bytes": self.token_bytes,
        }
        return _Pool(job, known, workers)

    def _spread(self, rows: Iterator[tuple[dict[str, Any], T]], pool: _Pool) -> Iterator[tuple[T, Tokens | RowProblem]]:
        """Give the rows to the workers; until they are ready, encode them here."""
        waiting: deque[tuple[list[T], Future[list[Tokens | RowProblem]]]] = deque()
        for chunk in _chunks(rows):
            values, marks = [row for row, _ in chunk], [mark for _, mark in chunk]
            if pool.ready():
                waiting.append((marks, pool.encode(values)))
            else:
                waiting.append((marks, Future()))
                waiting[-1][1].set_result(self._here(values))
            while len(waiting) > 2 * pool.size or (waiting and waiting[0][1].done()):
                marks, found = waiting.popleft()
                yield from zip(marks, found.result(), strict=True)
        for marks, found in waiting:
            yield from zip(marks, found.result(), strict=True)


def most_workers() -> int:
    """One a core that this process may use, as far as memory goes."""
    from edgetune.runtime.hardware import hardware

    machine = hardware()
    return max(
        1,
        min(
            int(machine["cpu"]["usable_cores"]),
            int(machine["memory"]["available_mb"]) // (2 * _WORKER_MB),
            _MOST_WORKERS,
        ),
    )


def _chunks(rows: Iterator[tuple[dict[str, Any], T]]) -> Iterator[list[tuple[dict[str, Any], T]]]:
    for first in rows:
        chunk, size = [first], _size(first[0])
        for more in islice(rows, _CHUNK - 1):
            chunk.append(more)
            size += _size(more[0])
            if size > _CHUNK_CHARACTERS:
                break
        yield chunk


def _size(values: dict[str, Any]) -> int:
    return len(values["text"]) if "text" in values else sum(len(turn["content"]) for turn in values["messages"])


class _Pool:
    """Worker processes, each served by a thread of this process."""

    def __init__(self, job: dict[str, Any], known: str, workers: int) -> None:
        self.size = workers
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed below
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="encode")
        self._workers = [self._open() for _ in range(workers)]
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._starting = [self._threads.submit(self._greet, worker, job) for worker in self._workers]
        self._known, self._usable = known, True

    def _open(self) -> subprocess.Popen[bytes]:
        # In a session of its own, so that Ctrl-C at the terminal reaches only this process, which ends the workers.
        return subprocess.Popen(
            _COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, start_new_session=True
        )

    def _greet(self, worker: subprocess.Popen[bytes], job: dict[str, Any]) -> str | None:
        said: str | None = self._ask(worker, job)
        self._idle.put(worker)
        return said

    def ready(self) -> bool:
        """Whether the workers can be given rows. Raises EdgetuneError when one ended."""
        if self._starting and all(start.done() for start in self._starting):
            self._usable = {start.result() for start in self._starting} == {self._known}
            self._starting = []
        return self._usable and not self._starting

    def encode(self, rows: list[dict[str, Any]]) -> Future[list[Tokens | RowProblem]]:
        """Have rows encoded by the next worker that is idle."""
        return self._threads.submit(self._encode, rows)

    def _encode(self, rows: list[dict[str, Any]]) -> list[Tokens | RowProblem]:
        worker = self._idle.get()
        try:
            found: list[Tokens | RowProblem] = self._ask(worker, rows)
        finally:
            self._idle.put(worker)
        return found

    def _ask(self, worker: subprocess.Popen[bytes], question: object) -> Any:
        assert worker.stdin is not None and worker.stdout is not None
        try:
            pickle.dump(question, worker.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            worker.stdin.flush()
            return pickle.load(worker.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                raise _died(worker.wait(5), self._errors) from None
            worker.kill()  # it lives and talks nonsense
            raise _died(0, self._errors) from None

    def close(self) -> None:
        """End the workers, whatever they are at."""
        for worker in self._workers:
            worker.kill()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.wait()
            for pipe in (worker.stdin, worker.stdout):
                with contextlib.suppress(OSError):  # what was not sent has nobody to read it
                    if pipe is not None:
                        pipe.close()
        self._errors.close()


def _died(code: int, errors: IO[str]) -> EdgetuneError:
    errors.seek(0)
    tail = "\n  ".join(errors.read().strip().splitlines()[-4:])
    how, fix = f"exit code {code}", "run it again; `edgetune doctor` checks the installation"
    if code < 0:
        how = signal.Signals(-code).name
        if how == "SIGKILL":
            how, fix = f"{how}, as the system does when memory runs out", "close other programs and run it again"
    what = f"a process that encodes rows ended before its work was done ({how})"
    return EdgetuneError(f"{what}\n  {tail}" if tail else what, where="data", fix=fix)
