"""How `train_speed.py` starts each side's training in a process of its own, and what it reads of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from _train_speed_table import OURS, Run

from edgetune.errors import EdgetuneError
from edgetune.files import home

HERE = Path(__file__).parent
TRL = "1.16.0"
BATCH = 8  # rows a step, the default of both
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}

# What is set for every TRL training: to run on a CPU, with the rows, rate and order given, and without writing checkpoints.
_NEEDED: dict[str, Any] = {
    "use_cpu": True,  # else it asks for a GPU, as bf16 is on by default
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
# A bfloat16 base needs no autocast, which would recast every frozen weight at every product.
_BF16: dict[str, Any] = {"model_init_kwargs": {"dtype": "bfloat16"}, "gradient_checkpointing": False, "bf16": False}
_FLAT: dict[str, Any] = {**_BF16, "padding_free": True, "max_length": None}


@dataclass(frozen=True)
class Side:
    """One contestant: what it is called, and for TRL what it is given beyond the defaults."""

    title: str
    sft: dict[str, Any] | None = None
    default: bool = False


def _rows(size: int, **more: Any) -> dict[str, Any]:
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": BATCH // size, **more}


# The first three are the comparison. The others are what the tuned one was chosen from; `--only` runs them.
SIDES: dict[str, Side] = {
    OURS: Side("edgetune", default=True),
    "trl": Side("TRL as it comes", {}, default=True),
    "trl-tuned": Side("TRL tuned", {**_BF16, **_rows(1)}, default=True),
    "trl-autocast": Side("TRL, bf16 base, 1 row, autocast", {**_BF16, **_rows(1), "bf16": True}),
    "trl-8-rows": Side("TRL, bf16 base, 8 rows", {**_BF16, **_rows(8)}),
    "trl-by-length": Side(
        "TRL, bf16 base, 4 rows of one length", {**_BF16, **_rows(4), "train_sampling_strategy": "group_by_length"}
    ),
    "trl-flat-2": Side("TRL, bf16 base, 2 rows without padding", {**_FLAT, **_rows(2)}),
    "trl-flat-4": Side("TRL, bf16 base, 4 rows without padding", {**_FLAT, **_rows(4)}),
    "trl-flat-8": Side("TRL, bf16 base, 8 rows without padding", {**_FLAT, **_rows(8)}),
    "trl-compile": Side("TRL, bf16 base, 1 row, torch.compile", {**_BF16, **_rows(1), "torch_compile": True}),
}


@dataclass(frozen=True)
class Used:
    """What a process used: seconds of the clock and of the processor, largest memory (10^6 bytes), others' cores.

    Linux counts a process's largest memory from the one that starts it on: start from a small one.
    """

    wall_s: float
    cpu_s: float
    peak_mb: float
    others: float


def run(command: Sequence[str | Path], log: Path, cwd: Path) -> Used:
    """Run a command to its end, its output into `log`.

    Raises:
        EdgetuneError: it failed; with the end of its output.
    """
    env = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(cwd / "datasets"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    before, start = _busy(), time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen([str(word) for word in command], stdout=out, stderr=out, cwd=cwd, env=env)
        try:
            _, status, usage = os.wait4(process.pid, 0)  # its peak memory, which no waiting in Python tells
        except BaseException:
            process.kill()
            process.wait()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    wall, cpu = time.monotonic() - start, usage.ru_utime + usage.ru_stime
    if process.returncode:
        end = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-8:]
        raise EdgetuneError(
            f"{' '.join(map(str, command))} failed ({process.returncode}):\n" + "\n".join(end), where=log
        )
    peak = usage.ru_maxrss if sys.platform == "darwin" else usage.ru_maxrss * 1024
    return Used(wall, cpu, peak / 1e6, max(0.0, (_busy() - before - cpu) / wall))


def _busy() -> float:
    """Processor seconds that the machine has worked so far, with what the host took away."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


def tool(name: str, job: dict[str, Any], work: Path) -> dict[str, Any]:
    """Ask `_train_speed_tools.py` in a process of its own."""
    file, answer = work / f"{name}.job.json", work / f"{name}.answer.json"
    file.write_text(json.dumps({**job, "answer": str(answer)}), encoding="utf-8")
    run([sys.executable, HERE / "_train_speed_tools.py", name, file], work / f"{name}.log", work)
    found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return found


def trl_python(work: Path) -> Path:
    """The Python of an environment with TRL and this environment's versions of the rest, made where there is none yet."""
    wanted = {name: metadata.version(name) for name in ("torch", "transformers", "peft", "accelerate")}
    said = "-".join(version for name in wanted for version in (name, wanted[name]))
    folder = home() / "benchmarks" / f"trl-{TRL}-py{sys.version_info[0]}.{sys.version_info[1]}-{said}"
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.is_file():
        print(f"making an environment for TRL {TRL} in {folder}", file=sys.stderr, flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        run([sys.executable, "-m", "venv", folder], work / "venv.log", work)
        packages = [f"{name}=={version}" for name, version in wanted.items()]
        run([python, "-m", "pip", "install", "--quiet", f"trl=={TRL}", *packages], work / "pip.log", work)
        ready.touch()
    return python


def recipe(job: dict[str, Any], seed: int, runs: Path) -> dict[str, Any]:
    """Our recipe of the same training: TRL's course of the learning rate; all else that is not named stays the default."""
    return {
        "name": OURS,
        "seed": seed,
        "runs_dir": str(runs),
        "model": {"id": job["model"]},
        "data": {name: str(job["folder"] / f"{name}.jsonl") for name in ("train", "validation")},
        "train": {
            "method": "lora",
            "rank": LORA["r"],
            "alpha": LORA["lora_alpha"],
            "target_modules": LORA["target_modules"],
            "batch_size": BATCH,
            "epochs": job["train"]["passes"],
            "learning_rate": job["learning_rate"],
            "scheduler": "linear",
            "warmup": 0,
            "evaluations": 1,
        },
    }


def edgetune(job: dict[str, Any], round: int, out: Path) -> tuple[Run, Path]:
    """Train with `edgetune train`. Returns the run, and the adapter's folder."""
    file = out / "recipe.yaml"
    file.write_text(json.dumps(recipe(job, 42 + round, out / "runs")), encoding="utf-8")  # JSON is YAML
    command = [sys.executable, "-m", "edgetune"]
    run([*command, "run", file, "--until", "data"], out / "data.log", out)
    used = run([*command, "train", file], out / "train.log", out)
    folder = out / "runs" / OURS
    lines = (folder / "train" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [row for row in map(json.loads, lines) if "seconds" in row and "tokens" in row]
    done = sum(row["tokens"] for row in steps)
    return _checked(OURS, job, round, len(steps), done, sum(row["seconds"] for row in steps), used), folder / "adapter"


def sft_of(name: str, job: dict[str, Any], seed: int) -> dict[str, Any]:
    """What a TRL side gives SFTConfig; the rest stays TRL's default."""
    same = {"num_train_epochs": job["train"]["passes"], "learning_rate": job["learning_rate"], "seed": seed}
    if job["train"]["longest"] > 1024:  # which is where it would cut
        same["max_length"] = None
    return {**_NEEDED, **same, **(SIDES[name].sft or {})}


def trl(name: str, job: dict[str, Any], round: int, out: Path, python: Path) -> tuple[Run, Path]:
    """Train with TRL. Returns the run, and the adapter's folder."""
    file, rows = out / "job.json", job["folder"] / "train_ids.jsonl"
    said = {"model": job["model"], "rows": str(rows), "out": str(out), "lora": LORA}
    file.write_text(json.dumps({**said, "sft": sft_of(name, job, 42 + round)}), encoding="utf-8")
    used = run([python, HERE / "_train_speed_trl.py", file], out / "train.log", out)
    said = json.loads((out / "steps.json").read_text(encoding="utf-8"))
    seconds = said["seconds"]
    return _checked(name, job, round, len(seconds), said["tokens"], sum(seconds), used), out / "adapter"


def _checked(side: str, job: dict[str, Any], round: int, steps: int, tokens: int, seconds: float, used: Used) -> Run:
    wanted = (job["steps"], job["train"]["tokens"])
    if (steps, tokens) != wanted:
        raise EdgetuneError(
            f"{side} took {steps} steps over {tokens} tokens, not {wanted[0]} over {wanted[1]}: not comparable",
            fix="give rows without duplicates, all of which the data stage keeps",
        )
    return Run(side, round, steps, tokens, seconds, used.peak_mb, used.wall_s, used.cpu_s, used.others)
