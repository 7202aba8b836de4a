"""Starting the processes of a training, with torchrun's agent, and telling of the one that failed."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgetune import progress
from edgetune.errors import EdgetuneError
from edgetune.files import read_json, write_json
from edgetune.recipe import TrainSection
from edgetune.train import distributed
from edgetune.train.crew import Crew

_MEETING_S = 1800.0  # how long machines wait for each other
_KEY = "assignment"
_AGAIN = "with --resume, training goes on from the last checkpoint, with another number of processes, too"

_store: Any = None  # the leader's, of several machines or scheduled processes, while the command runs


@contextlib.contextmanager
def leading(crew: Crew | None) -> Iterator[None]:
    """While the leader's command runs: those that wait on other machines can ask what to do, and are let go after it."""
    global _store
    if crew is None or crew.by_ssh or (crew.place is None and len(crew.hosts) == 1):
        yield
        return
    _store = _meet(crew)
    try:
        yield
        if not _store.check([_KEY]):
            _store.set(_KEY, json.dumps(None))
        _leave(crew, _store)
    finally:
        _store = None


def follow(crew: Crew, threads: int | None) -> None:
    """Wait for what the leader assigns, and take part in it. Returns when the training is over.

    Raises:
        EdgetuneError: the leader is gone, or the training failed.
    """
    store = _meet(crew)
    try:
        assignment = _assigned(store)
        if assignment is None:
            return
        if crew.place:
            _own_part(assignment, crew, store)
        else:
            _agent(crew, assignment, threads)
    finally:
        _leave(crew, store)


def _assigned(store: Any) -> dict[str, Any] | None:
    """What the leader says once it comes to training; None when there is nothing to train."""
    import torch

    try:
        while not store.check([_KEY]):  # the leader prepares data still; torch's own waiting would not hear Ctrl-C
            time.sleep(0.2)
        found: dict[str, Any] | None = json.loads(store.get(_KEY))
    except (torch.distributed.DistError, RuntimeError) as error:
        raise EdgetuneError("the first process is gone", fix="see what it said") from error
    return found


def start(crew: Crew, section: TrainSection, assignment: dict[str, Any]) -> None:
    """Train with all processes of a crew; this process leads it.

    Args:
        crew: who trains.
        section: the recipe's `train`.
        assignment: what the processes need to know, as JSON; `notes` is a folder that all of them see.

    Raises:
        EdgetuneError: what the process said that failed first.
    """
    notes = Path(assignment["notes"])
    shutil.rmtree(notes, ignore_errors=True)
    notes.mkdir(parents=True)
    if _store is not None:
        _store.set(_KEY, json.dumps(assignment))
    if crew.place:
        _own_part(assignment, crew, _store)
    else:
        others = _by_ssh(crew, assignment) if crew.by_ssh else []
        try:
            _agent(crew, assignment, section.threads)
        finally:
            for other in others:
                other.terminate()
    shutil.rmtree(notes, ignore_errors=True)


def _own_part(assignment: dict[str, Any], crew: Crew, store: Any) -> None:
    """Train in this very process, which a scheduler has started as one of several."""
    from edgetune.train import worker

    assert crew.place
    try:
        worker.take_part(assignment, crew.place, store)
    except (RuntimeError, OSError) as error:
        if not worker.peer_gone(error):
            raise
        raise EdgetuneError("another process is gone", where="train", fix=f"see what it said; {_AGAIN}") from error


def _meet(crew: Crew) -> Any:
    import torch

    if not crew.leads:
        _until_there(crew)
    try:
        return torch.distributed.TCPStore(  # type: ignore[attr-defined]
            crew.address, crew.port + 1, is_master=crew.leads, timeout=distributed.PATIENCE, wait_for_workers=False
        )
    except (torch.distributed.DistError, RuntimeError, OSError) as error:
        raise _not_met(crew, str(error).splitlines()[0]) from error


def _until_there(crew: Crew) -> None:
    """Wait for the first process. torch would do that, too, but hears neither Ctrl-C nor SIGTERM meanwhile."""
    deadline, said = time.monotonic() + _MEETING_S, False
    while True:
        try:
            socket.create_connection((crew.address, crew.port + 1), timeout=5).close()
            return
        except socket.gaierror as error:
            raise _not_met(crew, "no machine of this name is known") from error
        except OSError as error:
            if time.monotonic() > deadline:
                raise _not_met(crew, (error.strerror or "it does not answer").lower()) from error
        if not said:
            progress.say(f"waiting for the first process at {crew.address}:{crew.port + 1}")
            said = True
        time.sleep(0.5)


def _not_met(crew: Crew, why: str) -> EdgetuneError:
    who = "cannot wait for the others" if crew.leads else "cannot reach the first machine"
    return EdgetuneError(
        f"{who} at {crew.address}:{crew.port + 1}: {why}",
        where="MASTER_ADDR",
        fix="check address and firewall; MASTER_PORT chooses another port (it and the next are used)",
    )


def _leave(crew: Crew, store: Any) -> None:
    """The leader, who holds the store, goes last."""
    import torch

    expected = crew.place.size if crew.place else len(crew.hosts)
    deadline = time.monotonic() + 30
    with contextlib.suppress(torch.distributed.DistError, RuntimeError):  # it is gone already
        store.add("left", 1)
        while crew.leads and store.add("left", 0) < expected and time.monotonic() < deadline:
            time.sleep(0.05)


def _by_ssh(crew: Crew, assignment: dict[str, Any]) -> list[subprocess.Popen[bytes]]:
    paper = Path(assignment["notes"]) / "assignment.json"
    plan = {
        "hosts": [[host.name, host.slots] for host in crew.hosts],
        "address": crew.address,
        "port": crew.port,
        "assignment": assignment,
    }
    write_json(paper, plan)
    started = []
    for number, host in enumerate(crew.hosts[1:], 1):
        command = shlex.join([sys.executable, "-m", "edgetune.train.worker", str(paper.absolute()), str(number)])
        line = f"cd {shlex.quote(str(Path.cwd()))} && exec {command}"
        # Without a terminal the other end's processes would outlive a broken connection.
        started.append(
            subprocess.Popen(["ssh", "-tt", "-o", "BatchMode=yes", host.name, line], stdin=subprocess.DEVNULL)
        )
    return started


def agent_of(paper: Path, machine: int) -> None:
    """What a machine does that was started through ssh."""
    from edgetune.train.crew import Host

    plan = read_json(paper)
    hosts = tuple(Host(name, slots) for name, slots in plan["hosts"])
    crew = Crew(hosts, machine, plan["address"], plan["port"], by_ssh=True)
    _agent(crew, plan["assignment"], plan["assignment"]["threads"])


def _agent(crew: Crew, assignment: dict[str, Any], threads: int | None) -> None:
    """Run this machine's processes until all are done, or one fails, which ends the others."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    notes = Path(assignment["notes"])
    several = len(crew.hosts) > 1
    quiet_ones = range(0 if crew.machine else 1, crew.local)  # all but the first of all
    logs = notes / f"machine-{crew.machine}"
    config = LaunchConfig(
        min_nodes=len(crew.hosts),
        max_nodes=len(crew.hosts),
        nproc_per_node=crew.local,
        run_id="edgetune",
        max_restarts=0,
        rdzv_backend="static" if several else "c10d",
        rdzv_endpoint=f"{crew.address}:{crew.port}" if several else "localhost:0",
        rdzv_configs={"rank": crew.machine, "timeout": int(_MEETING_S)} if several else {},
        local_addr=None if several else "localhost",
        logs_specs=DefaultLogsSpecs(str(logs), redirects=dict.fromkeys(quiet_ones, Std.ALL)),
        signals_to_handle="SIGQUIT",  # the others are ours: they raise, and the agent ends its processes then
        shutdown_timeout=10,
    )
    cores = os.cpu_count() or 1
    environment = {"OMP_NUM_THREADS": str(threads or max(1, cores // crew.local)), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    paper = logs / "assignment.json"
    write_json(paper, assignment)
    with _said_by(environment), _silent_agent(), _signals():
        try:
            elastic_launch(config, sys.executable)("-m", "edgetune.train.worker", str(paper.absolute()))
        except ChildFailedError as error:
            raise _why(notes, error.failures, crew, logs) from None


@contextlib.contextmanager
def _said_by(environment: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update({name: value for name, value in environment.items() if name not in os.environ})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


@contextlib.contextmanager
def _silent_agent() -> Iterator[None]:
    """Its warnings and stack traces say in many lines what `_why` says in one."""
    logger = logging.getLogger("torch.distributed")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    names = [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed")]
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGQUIT)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGQUIT, before)


def _why(notes: Path, failures: dict[int, Any], crew: Crew, logs: Path) -> EdgetuneError:
    """The failure that came first: an error that a process wrote down, a signal, or what it last printed."""
    written = [read_json(path) for path in sorted(notes.glob("error-*.json"))]
    own = sorted((one for one in written if not one["follows"]), key=lambda one: one["at"])
    offset = sum(host.slots for host in crew.hosts[: crew.machine])
    killed = {rank: f for rank, f in failures.items() if f.exitcode < 0 and f.exitcode != -signal.SIGTERM}
    if own:
        return _told(own[0], crew)
    if killed:
        local, failure = next(iter(killed.items()))
        number = -failure.exitcode
        fix = _AGAIN
        if number == signal.SIGKILL:
            fix = f"if memory ran out, start fewer processes, or lower train.pass_tokens; {fix}"
        name = signal.Signals(number).name if number in signal.valid_signals() else f"signal {number}"
        return EdgetuneError(f"process {offset + local} of {crew.size} was ended by {name}", where="train", fix=fix)
    if written:
        return _told(written[0], crew)
    local, failure = next(iter(failures.items()))
    last = _last_words(logs, local)
    return EdgetuneError(
        f"process {offset + local} of {crew.size} ended with exit code {failure.exitcode}{last}",
        where="train",
        fix=_AGAIN,
    )


def _told(note: dict[str, Any], crew: Crew) -> EdgetuneError:
    error = EdgetuneError(note["what"], where=note["where"], fix=note["fix"] or _AGAIN)
    if not note["expected"]:
        error.what = f"process {note['rank']} of {crew.size}: {note['what']}"
        error.fix = f"this is a fault of edgetune; please report it with {note['log']}; {_AGAIN}"
        error.args = (error.text(),)
    error.exit_code = note["exit_code"]
    return error


def _last_words(logs: Path, local: int) -> str:
    for path in logs.glob(f"*/attempt_0/{local}/stderr.log"):
        lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        if lines:
            return f"; its last words: {lines[-1][:300]}"
    return ""
