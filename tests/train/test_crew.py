"""Who trains: the command line, a host file, and what schedulers set."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edgetune.errors import EdgetuneError, InputError
from edgetune.recipe import TrainSection
from edgetune.train import crew
from edgetune.train.crew import Crew, Host
from edgetune.train.distributed import Place


def test_who_trains_is_read_from_the_environment() -> None:
    section = TrainSection()
    assert crew.find(section, None, None, {}) is None
    assert crew.find(section, 1, None, {}) == Crew((Host("localhost", 1),))
    tasks = {
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NODELIST": "gpu[07-08]",
        "SLURM_JOB_ID": "12",
    }
    found = crew.find(section, None, None, tasks)
    assert found is not None and found.place == Place(5, 1, 8, 4)
    assert (found.address, found.local, found.leads, found.size) == ("gpu07", 4, False, 8)
    # the script of a job, outside of srun, is no task of it
    assert crew.find(section, None, None, {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) is None
    machine = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a"}
    found = crew.find(section, 1, None, machine)
    assert found is not None and (found.size, found.leads, found.local) == (2, False, 1)
    assert [crew.first_host(nodes) for nodes in ("a", "a,b", "n[1,3]", "x-[010-12,14],y")] == ["a", "a", "n1", "x-010"]


@pytest.mark.parametrize(
    ("nproc", "environment", "said"),
    [
        (0, {}, "--nproc is 0"),
        (99_999, {}, "--nproc is 99999, and this machine has"),
        (1, {"NNODES": "2"}, "no address"),
        (1, {"NNODES": "2", "MASTER_ADDR": "a", "NODE_RANK": "2"}, "NODE_RANK must be 0 to 1"),
        (1, {"NNODES": "two"}, "`two` is no number"),
        (1, {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a"}, "started already"),
        (None, {"WORLD_SIZE": "2", "RANK": "0"}, "no address"),
        (None, {"WORLD_SIZE": "2", "RANK": "5", "MASTER_ADDR": "a"}, "process 5 of 2"),
        (None, {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "99999"}, "99999 is no port"),
    ],
)
def test_who_cannot_train_is_told_why(nproc: int | None, environment: dict[str, str], said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        crew.find(TrainSection(), nproc, None, environment)


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        ("a slots=2\nb slots=x\n", ":2", "`b slots=x` is no host"),
        ("a slots=0\n", ":1", "no host"),
        ("a\n\na slots=2 # again\n", ":3", "there twice"),
        ("# nothing\n", "hosts", "names no host"),
    ],
)
def test_broken_host_files_are_explained(tmp_path: Path, text: str, place: str, said: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(InputError, match=said) as error:
        crew.read_hostfile(path)
    assert error.value.where is not None and error.value.where.endswith(place)


def test_host_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# two\nnode-1 slots=4\n10.0.0.2   slots = 2 # small\nc\n")
    assert crew.read_hostfile(tmp_path / "hosts") == (Host("node-1", 4), Host("10.0.0.2", 2), Host("c", 1))
    with pytest.raises(EdgetuneError, match="cannot be read"):
        crew.read_hostfile(tmp_path / "none")
