"""A training that is killed (-9) in the middle of a checkpoint write: the same command goes on from the last whole one."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import edgetune, write_jsonl

SETTINGS = """
model: {{id: {model}}}
data: {{train: rows.jsonl, validation: {{auto: 0.25}}}}
train: {{rank: 4, learning_rate: 0.05, dropout: 0.1, max_steps: 6, batch_size: 4, evaluations: 3, samples: 1, threads: 1}}
"""

# Starts the command line with a function that kills the process while it writes the checkpoint of step 4.
KILLED = """
import os, signal, sys
from pathlib import Path

import torch, transformers
from edgetune.train import checkpoints

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def half(path):
    with open(path, "rb+") as file:
        file.truncate(os.path.getsize(path) // 2)

def at_step_4(path):
    return "checkpoint-4" in str(path)

{patch}
from edgetune.cli import main
sys.argv = ["edgetune", "run", "tiny.yaml", "name=killed", "--until", "train"]
main()
"""
MOMENTS = {
    "the weights are there, the optimizer's state is half written": (
        """
real = torch.save
def save(value, file, *more, **options):
    real(value, file, *more, **options)
    if at_step_4(file):
        half(file); die()
torch.save = save
"""
    ),
    "all is written, one file has not reached the disk, and no mark says that it is whole": (
        """
def complete(self, step):
    if step == 4:
        half(self.folder / "checkpoint-4" / "optimizer.pt")
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 5, "lo')
        die()
    real(self, step)
real = checkpoints.Checkpoints.complete
checkpoints.Checkpoints.complete = complete
"""
    ),
    "the mark is there, a file is half of what it says": (
        """
real = checkpoints.Checkpoints.complete
def complete(self, step):
    real(self, step)
    if step == 4:
        half(self.folder / "checkpoint-4" / "optimizer.pt"); die()
checkpoints.Checkpoints.complete = complete
"""
    ),
}


@pytest.fixture
def project(tmp_path: Path, tiny_model: Path, tiny_rows: list[dict[str, Any]]) -> Path:
    write_jsonl(tmp_path / "rows.jsonl", tiny_rows)
    (tmp_path / "tiny.yaml").write_text(SETTINGS.format(model=tiny_model))
    return tmp_path


def outcome(run: Path) -> dict[str, Any]:
    """The adapter's bytes, the losses of all steps, and the answers."""
    rows = [json.loads(line) for line in (run / "train/metrics.jsonl").read_text().splitlines()]
    report = json.loads((run / "train/report.json").read_text())
    return {
        "adapter": (run / "adapter/adapter_model.safetensors").read_bytes(),
        "metrics": [{name: value for name, value in row.items() if name != "seconds"} for row in rows],
        "told": [report[name] for name in ("validation", "best_step", "steps", "samples")],
    }


@pytest.mark.slow
def test_killed_in_the_middle_of_a_checkpoint(project: Path) -> None:
    done = edgetune("run", "tiny.yaml", "name=whole", "--until", "train", cwd=project)
    assert done.returncode == 0, done.stderr
    wanted = outcome(project / "runs/whole")
    assert wanted["told"][1] == 6, "else the best weights would come from before the kill"
    for moment, patch in MOMENTS.items():
        code = KILLED.format(patch=patch)
        killed = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True, check=False)
        assert killed.returncode == -signal.SIGKILL, (moment, killed.stderr)
        folder = project / "runs/killed"
        assert (folder / "checkpoints/checkpoint-4").is_dir() and not (folder / "adapter").exists(), moment
        done = edgetune("run", "tiny.yaml", "name=killed", "--until", "train", cwd=project)
        assert done.returncode == 0 and "resuming after step 2 of 6" in done.stderr, (moment, done.stderr)
        assert outcome(folder) == wanted, moment
        assert not (folder / "checkpoints").exists()
        shutil.rmtree(folder)
