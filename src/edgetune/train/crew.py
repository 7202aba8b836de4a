"""Who trains: how many processes on which machines, from the command line, a host file or the scheduler."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgetune.errors import InputError
from edgetune.recipe import TrainSection
from edgetune.train.distributed import Place

_PORT = 29500


@dataclass(frozen=True)
class Host:
    """A machine, and how many processes it runs."""

    name: str
    slots: int


@dataclass(frozen=True)
class Crew:
    """The processes of one training.

    Attributes:
        hosts: the machines; the first one leads.
        machine: number of this machine.
        address, port: where the leader is met; the port after it is used, too.
        by_ssh: the leader starts the other machines' processes (else whoever started this one did).
        place: this very process's place, where a scheduler has started one for each.
    """

    hosts: tuple[Host, ...]
    machine: int = 0
    address: str = "127.0.0.1"
    port: int = 0
    by_ssh: bool = False
    place: Place | None = None

    @property
    def size(self) -> int:
        """How many processes there are on all machines."""
        return self.place.size if self.place else sum(host.slots for host in self.hosts)

    @property
    def leads(self) -> bool:
        """Whether the command runs the other stages here; the others only train."""
        return self.place.first if self.place else self.machine == 0

    @property
    def local(self) -> int:
        """Processes on this machine."""
        return self.place.here if self.place else self.hosts[self.machine].slots


def find(
    section: TrainSection, nproc: int | None, hostfile: Path | None, environment: Mapping[str, str] = os.environ
) -> Crew | None:
    """Who is to train; None for this process alone.

    Args:
        section: the recipe's `train`.
        nproc: processes on each machine, as the person said; with `train.distributed`, one for each GPU when None.
        hostfile: of several machines, as the person said.
        environment: SLURM's variables of a task, or RANK and WORLD_SIZE, name this process's place; NNODES, NODE_RANK,
            MASTER_ADDR and MASTER_PORT name this machine's.

    Raises:
        InputError: fewer than one process or more than cores, a broken host file, several machines without an address.
    """
    if nproc is not None and nproc < 1:
        raise InputError(f"--nproc is {nproc}", fix="give the number of processes on each machine, at least 1")
    cores = os.cpu_count() or 1
    if nproc is not None and nproc > cores:
        raise InputError(f"--nproc is {nproc}, and this machine has {cores} cores", fix=f"give {cores} at most")
    scheduled = _scheduled(environment)
    if scheduled:
        if nproc or hostfile:
            raise InputError(
                f"{scheduled.size} processes were started already, by the scheduler",
                where="--nproc" if nproc else "--hostfile",
                fix="leave it out, or start one process only",
            )
        return scheduled
    port = _port(environment, _PORT)
    if hostfile:
        hosts = read_hostfile(hostfile)
        address = environment.get("MASTER_ADDR", hosts[0].name)
        if len(hosts) == 1:
            return Crew(hosts)
        return Crew(hosts, address=address, port=port, by_ssh=True)
    machines = _number(environment, "NNODES", 1)
    if nproc is None and section.distributed is None and machines == 1:
        return None
    host = Host("localhost", nproc or _gpus())
    if machines == 1:
        return Crew((host,))
    if "MASTER_ADDR" not in environment:
        raise InputError(
            f"NNODES says {machines} machines, and no address of the first",
            where="MASTER_ADDR",
            fix="set MASTER_ADDR to the first machine's name or IP on each of them, and NODE_RANK to 0, 1, …",
        )
    number = _number(environment, "NODE_RANK", -1)
    if not 0 <= number < machines:
        raise InputError(
            f"NODE_RANK must be 0 to {machines - 1}, a number of its own for each machine", where="NODE_RANK"
        )
    return Crew((host,) * machines, number, environment["MASTER_ADDR"], port)


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """Read `HOST slots=N` a line, as DeepSpeed and Open MPI write it; `#` starts a remark.

    Raises:
        InputError: unreadable, empty, or a line that is not of this form, by file:line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("the host file cannot be read", where=path, fix="check --hostfile") from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.split("#", 1)[0].strip()
        if not text:
            continue
        found = re.fullmatch(r"([A-Za-z0-9][\w.:-]*)(?:\s+slots\s*=\s*(\d+))?", text)
        if not found or found[2] == "0":
            raise InputError(f"`{text}` is no host", where=f"{path}:{number}", fix="write: HOST slots=N")
        if found[1] in hosts:
            raise InputError(f"{found[1]} is there twice", where=f"{path}:{number}", fix="add its slots up in one line")
        hosts[found[1]] = int(found[2] or 1)
    if not hosts:
        raise InputError("the host file names no host", where=path, fix="write a line a machine: HOST slots=N")
    return tuple(Host(name, slots) for name, slots in hosts.items())


def first_host(nodes: str) -> str:
    """The first of SLURM's list of nodes: `gpu[07-09,12],cpu1` is gpu07."""
    found = re.match(r"([^,\[]+)(?:\[(\w+))?", nodes)
    return f"{found[1]}{found[2] or ''}" if found else nodes


def _scheduled(environment: Mapping[str, str]) -> Crew | None:
    """The crew of a process that a scheduler, or torchrun, has started as one of several."""
    if _number(environment, "SLURM_STEP_NUM_TASKS", 1) > 1 and "SLURM_PROCID" in environment:
        rank, local = _number(environment, "SLURM_PROCID", 0), _number(environment, "SLURM_LOCALID", 0)
        size, machines = (
            _number(environment, "SLURM_STEP_NUM_TASKS", 1),
            _number(environment, "SLURM_STEP_NUM_NODES", 1),
        )
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
        address = environment.get("MASTER_ADDR") or first_host(nodes) or "127.0.0.1"
        here = -(-size // machines)
        port = _port(environment, 20_000 + 2 * (_number(environment, "SLURM_JOB_ID", 0) % 5_000))
    elif _number(environment, "WORLD_SIZE", 1) > 1 and "RANK" in environment:
        rank, local = _number(environment, "RANK", 0), _number(environment, "LOCAL_RANK", 0)
        size = _number(environment, "WORLD_SIZE", 1)
        here = _number(environment, "LOCAL_WORLD_SIZE", size)
        port = _port(environment, _PORT)
        address = environment.get("MASTER_ADDR", "")
        if not address:
            raise InputError(
                f"WORLD_SIZE says {size} processes, and no address of the first",
                where="MASTER_ADDR",
                fix="set MASTER_ADDR to the first machine's name or IP for each of them",
            )
    else:
        return None
    if rank >= size:
        raise InputError(
            f"this is process {rank} of {size}: the count begins with 0",
            where="RANK, WORLD_SIZE",
            fix="let torchrun or srun set them, or unset them",
        )
    return Crew((Host(address, here),), address=address, port=port, place=Place(rank, local, size, here))


def _port(environment: Mapping[str, str], default: int) -> int:
    port = _number(environment, "MASTER_PORT", default)
    if not 1 <= port <= 65_534:
        raise InputError(
            f"{port} is no port", where="MASTER_PORT", fix="choose 1024 to 65534; the next one is used, too"
        )
    return port


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "")
    if not text:
        return default
    if not text.strip().isdigit():
        raise InputError(f"`{text}` is no number", where=name, fix=f"set or unset the environment variable {name}")
    return int(text)


def _gpus() -> int:
    import torch

    return max(1, torch.cuda.device_count())
