"""Several processes against one: the same losses, a whole adapter, an end without a hang, and going on."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from conftest import edgetune, write_jsonl
from edgetune.errors import InputError
from edgetune.plan import plan
from edgetune.recipe import TrainSection
from edgetune.recipe_file import load
from edgetune.train import memory
from edgetune.train.crew import Crew, Host
from edgetune.train.distributed import check

ENGINES = {
    "ddp": {},
    "zero1": {"engine": "deepspeed", "zero_stage": 1},
    "zero2": {"engine": "deepspeed", "zero_stage": 2},
    "zero3": {"engine": "deepspeed", "zero_stage": 3},
    "fsdp": {"engine": "fsdp"},
}
STEPS = 6


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder with a recipe and rows of many lengths."""
    folder = tmp_path_factory.mktemp("several")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {n} plus {n}? " * (1 + n % 3)},
                {"role": "assistant", "content": f"It is {2 * n}. " * (1 + n % 4)},
            ]
        }
        for n in range(20)
    ]
    write_jsonl(folder / "rows.jsonl", rows)
    recipe = {
        "model": {"id": str(tiny_model)},
        "data": {"train": "rows.jsonl"},
        "train": {
            "rank": 4,
            "batch_size": 6,
            "max_steps": STEPS,
            "learning_rate": 1e-2,
            "lora_plus_ratio": 2.0,
            "evaluations": 3,
            "samples": 1,
            "sample_tokens": 3,
            "pass_tokens": 64,
            "dtype": "float32",
            "threads": 1,
        },
    }
    (folder / "r.yaml").write_text(json.dumps(recipe))
    return folder


def _train(place: Path, name: str, *args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    home = {"EDGETUNE_HOME": str(place / "home"), **(env or {})}
    return edgetune("train", "r.yaml", f"name={name}", *args, cwd=place, env=home)


def _engine(name: str) -> list[str]:
    return [f"train.distributed.{key}={value}" for key, value in ENGINES[name].items()]


def _offloaded(name: str) -> list[str]:
    return [*_engine(name), "train.distributed.offload=cpu"]


def _several(place: Path, processes: int) -> list[str]:
    """Arguments for so many processes on this machine; a host file may name more than it has cores."""
    if processes <= (os.cpu_count() or 1):
        return ["--nproc", str(processes)]
    (place / "here.txt").write_text(f"localhost slots={processes}\n")
    return ["--hostfile", "here.txt"]


def _metrics(place: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / "runs" / name / "train" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(place: Path) -> list[dict[str, Any]]:
    """What one process measures."""
    done = _train(place, "alone")
    assert done.returncode == 0, done.stderr
    return _metrics(place, "alone")


def _same(place: Path, name: str, alone: list[dict[str, Any]]) -> None:
    found = _metrics(place, name)
    assert [row["step"] for row in found] == [row["step"] for row in alone]
    for one, other in zip(alone, found, strict=True):
        for key in ("loss", "grad_norm", "validation_loss", "validation_tokens", "learning_rate", "tokens"):
            if key in one:
                assert other[key] == pytest.approx(one[key], rel=2e-5, abs=2e-5), (one["step"], key)
    wanted = load_file(place / "runs" / "alone" / "adapter" / "adapter_model.safetensors")
    adapter = load_file(place / "runs" / name / "adapter" / "adapter_model.safetensors")
    assert adapter.keys() == wanted.keys()
    for key, value in wanted.items():
        assert adapter[key].shape == value.shape
        assert (adapter[key] - value).abs().max() < 1e-3


@pytest.mark.parametrize(
    "engine", ["ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero1", "zero2", "zero3", "fsdp"))]
)
def test_two_processes_learn_what_one_does(place: Path, alone: list[dict[str, Any]], engine: str) -> None:
    if "zero" in engine:
        pytest.importorskip("deepspeed")
    done = _train(place, engine, *_engine(engine), *_several(place, 2), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)  # nothing but the result
    _same(place, engine, alone)
    reports = [json.loads((place / "runs" / n / "train" / "report.json").read_text()) for n in ("alone", engine)]
    assert [report["processes"] for report in reports] == [1, 2]
    for key in (
        "parameters",
        "trainable_parameters",
        "tokens",
        "learned_tokens",
        "steps",
        "samples",
        "packed",
        "dtype",
    ):
        assert reports[0][key] == reports[1][key], key
    assert not (place / "runs" / engine / ".processes").exists()
    assert done.stderr.count("train …") == 1  # only the first speaks
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_two_processes_learn_through_rounding_what_one_does(place: Path) -> None:
    through = ["train.quantization_aware=true", "export.target=cpu-int4"]
    done = _train(place, "alone-rounded", *through)
    assert done.returncode == 0, done.stderr
    assert _train(place, "both-rounded", *through, *_several(place, 2)).returncode == 0
    first, second = _metrics(place, "alone-rounded"), _metrics(place, "both-rounded")
    assert first[0]["validation_loss"] == pytest.approx(second[0]["validation_loss"], rel=2e-5)
    losses = [[row["loss"] for row in found if "loss" in row] for found in (first, second)]
    assert losses[0][:2] == pytest.approx(losses[1][:2], rel=1e-3)  # later ones: a code may round the other way
    assert losses[0] == pytest.approx(losses[1], rel=3e-2)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3", "fsdp"])
def test_offloaded_and_with_activations_computed_twice(place: Path, alone: list[dict[str, Any]], engine: str) -> None:
    if "zero" in engine:
        pytest.importorskip("deepspeed")
    name = f"{engine}-offloaded"
    done = _train(place, name, *_offloaded(engine), *_several(place, 2), "train.gradient_checkpointing=true")
    assert done.returncode == 0, done.stderr
    _same(place, name, alone)


def _interrupt(
    place: Path, name: str, *args: str, who: str = "process", by: signal.Signals = signal.SIGKILL
) -> tuple[int, str]:
    """Train with two processes, and kill one of them, or what started them, once there is a whole checkpoint."""
    with subprocess.Popen(
        [sys.executable, "-m", "edgetune", "train", "r.yaml", f"name={name}", *args, *_several(place, 2)],
        cwd=place,
        env={**os.environ, "EDGETUNE_HOME": str(place / "home")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as leader:
        try:
            checkpoints = place / "runs" / name / "checkpoints"
            while not list(checkpoints.glob("checkpoint-*/complete.json")):
                assert leader.poll() is None
                time.sleep(0.01)
            workers = _workers(leader.pid)
            assert len(workers) == 2
            os.kill(workers[-1] if who == "process" else leader.pid, by)
            said = leader.communicate(timeout=300)[1]
        finally:
            leader.kill()
    _all_end(workers)
    return leader.returncode, said


def _workers(parent: int) -> list[int]:
    import psutil

    return sorted(child.pid for child in psutil.Process(parent).children() if "worker" in " ".join(child.cmdline()))


def _all_end(workers: list[int]) -> None:
    import psutil

    deadline = time.monotonic() + 60
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _goes_on(place: Path, engine: str, processes: int) -> None:
    many = ["train.max_steps=24", "train.evaluations=12", "train.samples=0"]
    code, said = _interrupt(place, f"{engine}-killed", *many, *_engine(engine))
    assert code == 1
    assert re.search(r"error: train: process [01] of 2 was ended by SIGKILL", said)
    assert "Traceback" not in said
    done = _train(place, f"{engine}-killed", *many, *_engine(engine), "--resume", *_several(place, processes))
    assert done.returncode == 0, done.stderr
    assert "resuming after step" in done.stderr
    whole = _train(place, "whole", *many)
    assert whole.returncode == 0, whole.stderr
    wanted = {row["step"]: row["loss"] for row in _metrics(place, "whole") if "loss" in row}
    for row in _metrics(place, f"{engine}-killed"):
        if "loss" in row and row["step"] <= 16:  # rounding grows with every step
            assert row["loss"] == pytest.approx(wanted[row["step"]], abs=1e-4), row["step"]


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_others_go_on(place: Path) -> None:
    pytest.importorskip("deepspeed")
    _goes_on(place, "zero3", 1)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "zero3"])
def test_each_engine_goes_on_with_three_processes(place: Path, engine: str) -> None:
    if "zero" in engine:
        pytest.importorskip("deepspeed")
    _goes_on(place, engine, 3)


@pytest.mark.parametrize(
    ("by", "code", "says"),
    [
        (signal.SIGKILL, -signal.SIGKILL, ""),
        pytest.param(signal.SIGINT, 130, "", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 143, "SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_no_process_outlives_the_command(place: Path, by: signal.Signals, code: int, says: str) -> None:
    found, said = _interrupt(
        place, f"{by.name}", "train.max_steps=4000", "train.evaluations=4000", who="command", by=by
    )
    assert found == code
    assert says in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_an_error_in_a_process_is_the_commands_error(place: Path) -> None:
    done = _train(place, "wrong", "train.target_modules=[no_proj]", *_several(place, 2))
    assert done.returncode == 2
    assert re.search(r"error: train.target_modules: .*no_proj", done.stderr)
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_whole_models_divided(place: Path) -> None:
    pytest.importorskip("deepspeed")
    recipe = json.loads((place / "r.yaml").read_text())
    del recipe["train"]["rank"], recipe["train"]["lora_plus_ratio"]
    recipe["train"] |= {"method": "full", "learning_rate": 1e-3}
    (place / "full.yaml").write_text(json.dumps(recipe))
    losses = []
    for name, more in (("full", []), ("full-zero3", _engine("zero3")), ("full-fsdp", _engine("fsdp"))):
        args = ["full.yaml", f"name={name}", *more, *(_several(place, 2) if more else [])]
        done = edgetune("train", *args, cwd=place, env={"EDGETUNE_HOME": str(place / "home")})
        assert done.returncode == 0, done.stderr
        losses.append([row["loss"] for row in _metrics(place, name) if "loss" in row])
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert losses[2] == pytest.approx(losses[0], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "engines"),
    [
        (["train.method=dora"], ["ddp", "zero3", "fsdp"]),
        (["train.method=qlora"], ["ddp", "zero2"]),
        (["train.modules_to_save=[lm_head]"], ["zero3"]),
        (["train.rslora=true", "train.dtype=bfloat16"], ["zero3", "fsdp"]),
    ],
)
def test_each_method_learns_the_same(place: Path, method: list[str], engines: list[str]) -> None:
    pytest.importorskip("deepspeed")
    if "qlora" in method[0]:
        pytest.importorskip("bitsandbytes")
    curves = []
    for name in ["alone", *engines]:
        more = [*_engine(name), *_several(place, 2)] if name != "alone" else []
        run = f"{method[0].split('=')[1].strip('[]')}-{name}"
        done = _train(place, run, *method, *more)
        assert done.returncode == 0, done.stderr
        curves.append([row["loss"] for row in _metrics(place, run) if "loss" in row])
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], abs=2e-3 if "train.dtype=bfloat16" in method else 1e-4)


@pytest.mark.slow
def test_three_divided_parts_merge(place: Path) -> None:
    pytest.importorskip("deepspeed")
    assert _train(place, "merges", *_engine("zero3"), *_several(place, 3)).returncode == 0
    home = {"EDGETUNE_HOME": str(place / "home")}
    done = edgetune("run", "r.yaml", "name=merges", *_engine("zero3"), "--until", "merge", cwd=place, env=home)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_machines_of_a_host_file_are_started_through_ssh(place: Path, alone: list[dict[str, Any]]) -> None:
    tools = place / "tools"
    tools.mkdir()
    ssh = tools / "ssh"  # the other machine is this one
    ssh.write_text('#!/bin/sh\nwhile [ "$1" != other ]; do shift; done\nshift\nexec sh -c "$*"\n')
    ssh.chmod(ssh.stat().st_mode | stat.S_IXUSR)
    (place / "hosts.txt").write_text("localhost slots=1 # this one\nother slots=1\n")
    env = {"PATH": f"{tools}:{os.environ['PATH']}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_port())}
    done = _train(place, "by-ssh", "--hostfile", "hosts.txt", env=env)
    assert done.returncode == 0, done.stderr
    _same(place, "by-ssh", alone)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["machines", "scheduler"])
def test_processes_that_others_started_meet(place: Path, alone: list[dict[str, Any]], how: str) -> None:
    port = str(_port())
    started = []
    for number in range(2):
        env = {**os.environ, "EDGETUNE_HOME": str(place / "home"), "MASTER_PORT": port}
        if how == "machines":
            env |= {"NNODES": "2", "NODE_RANK": str(number), "MASTER_ADDR": "127.0.0.1"}
        else:
            env |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)}
            env |= {"SLURM_STEP_NODELIST": "localhost"}
        command = [sys.executable, "-m", "edgetune", "train", "r.yaml", f"name={how}"]
        command += ["--nproc", "1"] if how == "machines" else []
        started.append(subprocess.Popen(command, cwd=place, env=env, stderr=subprocess.PIPE, text=True))
    said = [one.communicate(timeout=300)[1] for one in started]
    assert [one.returncode for one in started] == [0, 0], said
    _same(place, how, alone)


def _port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1]) - 2


def test_more_processes_than_rows_are_refused() -> None:
    check(TrainSection(batch_size=2), 2)
    with pytest.raises(InputError, match="3 processes would share a step of 2 rows"):
        check(TrainSection(batch_size=2), 3)


@pytest.mark.parametrize(
    ("more", "said"),
    [({"modules_to_save": ["lm_head"]}, "trained whole"), ({"initialization": "pissa"}, "pissa changes the base")],
)
def test_what_divided_weights_cannot_carry_is_refused(more: dict[str, Any], said: str) -> None:
    check(TrainSection.model_validate(more), 2)
    with pytest.raises(InputError, match=said):
        check(TrainSection.model_validate({**more, "distributed": {"engine": "fsdp"}}), 2)


def test_an_engine_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    section = TrainSection.model_validate({"distributed": {"engine": "deepspeed"}})
    with pytest.raises(InputError, match=r"edgetune\[deepspeed\]"):
        check(section, 2)


def test_a_process_of_many_holds_less_the_more_is_divided() -> None:
    def held(engine: dict[str, Any] | None, processes: int) -> float:
        section = TrainSection.model_validate({"method": "full", "distributed": engine})
        weights = memory.weight_bytes(section, 28e9, 2e9, 7_000_000_000, processes)
        return weights + memory.optimizer_bytes(section, 7_000_000_000, processes)

    alone = held(None, 1)
    assert alone == 20 * 7e9
    found = [held(ENGINES[name] or {"engine": "ddp"}, 8) for name in ("ddp", "zero1", "zero2", "zero3", "fsdp")]
    assert found == sorted(found, reverse=True)
    assert found[0] > alone > found[1]
    assert held(ENGINES["zero3"], 64) < held(ENGINES["zero3"], 8) < alone / 5


def test_the_plan_counts_the_processes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    loaded = load("r.yaml", ["name=planned", "train.distributed.engine=fsdp"])
    found = plan(loaded, first=None, until="train", force=False, crew=Crew((Host("localhost", 2),)))
    said = [check["what"] for check in found["checks"] if check["ok"]]
    assert any(re.search(r"2 processes, 2 of them here: each holds [\d,]+ MB while it trains", one) for one in said)
