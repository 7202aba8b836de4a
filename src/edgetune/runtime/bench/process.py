"""The measuring process from outside: started, told what to do, never outliving who started it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from edgetune.errors import EdgetuneError, InputError
from edgetune.runtime.bench.workloads import DoesNotFit, Workload

_COMMAND = (sys.executable, "-P", "-m", "edgetune.runtime.bench.worker")


@dataclass(frozen=True)
class Job:
    """How an artifact is loaded for measurement.

    Attributes:
        artifact: its folder, or the run that holds it.
        threads: CPU threads; all cores when None.
        provider: execution provider; the one that it was exported for when None.
        session: answer through a session, as chat, copy and prompts need, rather than on the bare generator.
        session_options: further entries of genai_config.json's `session_options`, for the bare generator.
        prefill_tokens: tokens of a prompt that are read at once, for the bare generator; as the device profile or the
            artifact has it when None.
        use_profile: run it with the settings that `edgetune tune` measured on this machine, where it did and `threads`
            is None.
        huge_pages: as `profile.Settings`, for the bare generator.
        adapter: the one that is on; see `Artifact.adapter`.
        speculation, exact: as GenerationOptions, for a session.
    """

    artifact: Path
    threads: int | None = None
    provider: str | None = None
    session: bool = False
    session_options: dict[str, Any] = field(default_factory=dict)
    prefill_tokens: int | None = None
    use_profile: bool = True
    huge_pages: bool = True
    adapter: str | None = None
    speculation: str = "auto"
    exact: bool = False


class Worker:
    """A process with a loaded artifact; a context manager. It works only while `round` is called.

    Raises:
        InputError: no sound artifact, a provider that is missing, work that does not fit.
        EdgetuneError: it cannot be loaded, or the process died.
    """

    def __init__(self, job: Job) -> None:
        self._errors: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        told = {**asdict(job), "artifact": str(job.artifact.absolute())}
        self._process = subprocess.Popen(
            [*_COMMAND, json.dumps(told)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
        )
        self.pid = self._process.pid
        self.peak_rss_mb = 0.0
        self.peak_pss_mb: float | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # does nothing where it has ended
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(BrokenPipeError):  # an order that nobody reads any more
                if stream:
                    stream.close()

    def opened(self) -> dict[str, Any]:
        """Wait until it is loaded. Returns the facts of `worker.opened`."""
        facts = dict(self._answer()["opened"])
        self.peak_rss_mb = facts["peak_rss_mb"]
        return facts

    def prepare(self, work: Workload, warmup: int, repetitions: int) -> int:
        """Get the rounds of a workload ready, warm-ups first. Returns how many there are.

        Raises DoesNotFit where the context does not hold it; the process goes on.
        """
        self.peak_rss_mb, self.peak_pss_mb = 0.0, None
        self._tell({"prepare": asdict(work), "warmup": warmup, "repetitions": repetitions})
        return int(self._answer()["rounds"])

    def round(self, number: int) -> list[dict[str, Any]]:
        """Do a round. Returns its samples, as `worker.Drawn.round` and `worker.Asked.round` have them."""
        self._tell({"round": number})
        found = self._answer()
        self.peak_rss_mb = max(self.peak_rss_mb, found["peak_rss_mb"])
        if found["pss_mb"] is not None:
            self.peak_pss_mb = max(self.peak_pss_mb or 0.0, found["pss_mb"])
        return list(found["samples"])

    def rows(self, number: int, counts: Sequence[int]) -> dict[str, Any] | None:
        """What reading several tokens at once takes; see `worker.Drawn.rows`."""
        self._tell({"rows": list(counts), "round": number})
        found = self._answer()["rows"]
        return None if found is None else dict(found)

    def _tell(self, order: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is dead: reading its answer says how it died
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise _died(self._process.wait(), self._errors)
        message = json.loads(line)
        if "error" in message:
            raise _explained(**message["error"])
        return dict(message)


def run_job(
    job: Job, work: Workload, warmup: int, repetitions: int
) -> tuple[dict[str, Any], list[list[dict[str, Any]]]]:
    """One measurement in a process of its own. Returns the facts of `worker.opened`, and the samples of each counted
    round."""
    with Worker(job) as worker:
        facts = worker.opened()
        rounds = worker.prepare(work, warmup, repetitions)
        found = [worker.round(number) for number in range(rounds)]
        return {**facts, "peak_rss_mb": worker.peak_rss_mb}, found[warmup:]


def _explained(kind: str, what: str, where: str | None, fix: str | None) -> EdgetuneError:
    kinds: dict[str, type[EdgetuneError]] = {"unfit": DoesNotFit, "input": InputError}
    return kinds.get(kind, EdgetuneError)(what, where=where, fix=fix)


def _died(code: int, errors: IO[str]) -> EdgetuneError:
    errors.seek(0)
    tail = "\n  ".join(errors.read().strip().splitlines()[-8:])
    how, fix = f"exit code {code}", "run it again with --threads 1; `edgetune doctor` checks the installation"
    if code < 0:
        how = signal.Signals(-code).name
        if how == "SIGKILL":
            how += ", as the system does when memory runs out"
            fix = "close other programs, lower prompt_tokens, or take a smaller model or precision"
        elif how == "SIGILL":
            fix = "the installed ONNX Runtime needs instructions that this processor lacks"
    what = f"the measuring process ended before its work was done ({how})"
    return EdgetuneError(f"{what}\n  {tail}" if tail else what, where="bench", fix=fix)


# Spins until its stdin ends, which it does at the latest when its parent is gone.
_SPIN = (
    "import os, sys, threading\n"
    "threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()\n"
    "print('spinning', flush=True)\n"
    "while True: pass"
)


@contextlib.contextmanager
def stress(processes: int) -> Any:
    """So many busy processes while the block runs. Gives their ids."""
    found: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(processes):
            found.append(
                subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", _SPIN],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,  # what Python says to Ctrl-C
                )
            )
        for process in found:
            assert process.stdout is not None
            process.stdout.readline()
        yield [process.pid for process in found]
    finally:
        for process in found:
            process.kill()
        for process in found:
            process.communicate()


def drop_from_cache(files: Sequence[Path]) -> str | None:
    """Put files out of the page cache, so that they are read from disk again. Returns why that failed, or None."""
    if not hasattr(os, "posix_fadvise"):
        return "this system has no way to drop files from its page cache"
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)  # what is not written yet is not dropped
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            if _cached(handle):
                return f"{path.name} stays in the page cache: another program uses it, or it lies in memory (tmpfs)"
        except OSError as error:
            return f"{path.name} cannot be dropped from the page cache: {error.strerror}"
        finally:
            os.close(handle)
    return None


def _cached(handle: int) -> bool:
    """Whether a file's middle can be read without the disk. Where the system cannot say: no."""
    try:
        return bool(os.preadv(handle, [bytearray(1)], os.fstat(handle).st_size // 2, os.RWF_NOWAIT))
    except (BlockingIOError, AttributeError, OSError):
        return False
