"""`edgetune sweep` as a user calls it: what is printed, and the exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import edgetune, write_jsonl


@pytest.fixture
def project(tmp_path: Path, tiny_model: Path, tiny_rows: list[dict[str, Any]]) -> Path:
    write_jsonl(tmp_path / "rows.jsonl", tiny_rows)
    (tmp_path / "tiny.yaml").write_text(
        f"model: {{id: {tiny_model}}}\n"
        "data: {train: rows.jsonl, validation: {auto: 0.25}}\n"
        "train: {rank: 4, learning_rate: 0.01, max_steps: 1, batch_size: 4, evaluations: 1, samples: 0, threads: 1}\n"
    )
    return tmp_path


@pytest.mark.slow
def test_from_the_plan_to_the_merged_best(project: Path) -> None:
    planned = edgetune("sweep", "tiny.yaml", "train.rank=2,4", "--dry-run", cwd=project)
    assert planned.returncode == 0, planned.stderr
    assert planned.stdout.count("to be trained") == 2 and not (project / "runs").exists()
    done = edgetune("sweep", "tiny.yaml", "train.rank=2,4", cwd=project)
    assert done.returncode == 0, done.stderr
    assert "2 points in runs/tiny-sweep" in done.stdout and "best: train.rank=" in done.stdout
    assert len(list(project.glob("runs/tiny-sweep/*/merged/config.json"))) == 1
    again = edgetune("sweep", "tiny.yaml", "train.rank=2,4", "--json", "--until", "train", cwd=project)
    told = json.loads(again.stdout)
    assert [point["state"] for point in told["points"]] == ["trained", "trained"] and told["carried_on"] is None


def test_a_failed_point_is_exit_1_with_the_table_and_the_best(project: Path) -> None:
    done = edgetune("sweep", "tiny.yaml", "train.target_modules=[[q_prj],[q_proj]]", "--json", cwd=project)
    told = json.loads(done.stdout)
    assert done.returncode == 1 and "1 of 2 points failed" in done.stderr
    assert [point["state"] for point in told["points"]] == ["trained", "failed"] and told["carried_on"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["train.rank=8,many"],
        ["train.rank=8"],
        [],
        ["train.rank=2,4", "--until", "data"],
        ["train.rank=2,4", "--until", "x"],
        ["train.rank=2,4", "data.train=nowhere.jsonl"],
        ["train.rank=2,4", "data.train=nowhere.jsonl", "--dry-run"],
    ],
)
def test_wrong_input_is_exit_2_before_anything_is_done(project: Path, arguments: list[str]) -> None:
    done = edgetune("sweep", "tiny.yaml", *arguments, cwd=project)
    assert done.returncode == 2 and "Traceback" not in done.stderr and not list(project.glob("runs/*/*"))
