"""`edgetune plan`: what is measured, what it says, and that nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from conftest import edgetune, write_jsonl
from edgetune import estimate, sweep
from edgetune.plan import plan, rows
from edgetune.recipe_file import load
from edgetune.run import STAGES
from edgetune.train import calibrate

SETTINGS = """
model: {{id: {model}}}
data: {{train: rows.jsonl, validation: {{auto: 0.25}}}}
train: {{rank: 4, max_steps: 2, batch_size: 4, evaluations: 1, samples: 0}}
"""


@pytest.fixture
def project(tmp_path: Path, tiny_model: Path, tiny_rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe and its rows; the working folder of the test."""
    write_jsonl(tmp_path / "rows.jsonl", tiny_rows)
    (tmp_path / "tiny.yaml").write_text(SETTINGS.format(model=tiny_model))
    monkeypatch.chdir(tmp_path)
    estimate._calibration.cache_clear()
    return tmp_path


def planned(*overrides: str, until: str | None = None) -> dict[str, Any]:
    return plan(load("tiny.yaml", overrides), first=None, until=until, force=False)


def wrong(found: dict[str, Any]) -> list[str]:
    return [check["what"] for check in found["checks"] if not check["ok"]]


def test_every_stage_has_time_memory_and_disk_and_nothing_is_written(project: Path) -> None:
    done = edgetune("plan", "tiny.yaml", "--json", cwd=project)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [stage["name"] for stage in found["stages"]] == list(STAGES)
    for stage in found["stages"]:
        assert stage["redo"] and all(stage[name] > 0 for name in ("seconds", "memory_mb", "disk_mb")), stage
    assert not wrong(found) and not (project / "runs").exists()


def test_what_is_measured_is_the_whole_model(project: Path, tiny_model: Path) -> None:
    """The tiny model has two layers, so the line through one and two of them must meet the model itself."""
    import torch

    from edgetune.models import load_model

    whole = f"{load_model(tiny_model, dtype=torch.float32).num_parameters():,}"
    checks = planned("train.method=full", "train.rank=16")["checks"]
    said = next(check["what"] for check in checks if "are trained" in check["what"])
    assert said.startswith(f"train: {whole} of {whole} parameters are trained")


def test_longer_training_takes_longer_and_more_memory_for_more_state(project: Path) -> None:
    short, long = (planned(f"train.max_steps={steps}")["stages"][1]["seconds"] for steps in (2, 2000))
    assert long > short
    adapter, full = (
        planned(*options)["stages"][1]["disk_mb"] for options in ([], ["train.method=full", "train.rank=16"])
    )
    assert full > adapter


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.target_modules=[q_prj]"], "the model has no layer `q_prj`"),
        (["data.train=none.jsonl"], "no such data file"),
        (["data.max_length=16"], "rows with problems"),
    ],
)
def test_what_cannot_be_trained_is_said(project: Path, overrides: list[str], said: str) -> None:
    found = planned(*overrides)
    assert any(said in text for text in wrong(found)), found["checks"]


def test_what_does_not_fit_is_said_with_what_to_change(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    little = psutil.virtual_memory()._replace(available=1_000_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: little)
    assert any("1 MB available (train): lower train.pass_tokens" in text for text in wrong(planned(until="train")))
    little = little._replace(available=1000)
    found = planned(until="train")
    assert any("training does not fit" in text and "data.max_length" in text for text in wrong(found))
    assert [row[2] for row in rows(found)] == ["?", "?"]


def test_a_sweep_measures_once_where_model_method_and_shapes_are_the_same(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = calibrate.calibrate, []

    def counted(*args: Any) -> Any:
        asked.append(args[0])
        return real(*args)

    monkeypatch.setattr(calibrate, "calibrate", counted)
    sweep.estimate(sweep.read("tiny.yaml", ["train.learning_rate=1e-4,2e-4", "seed=1,2", "train.weight_decay=0,0.1"]))
    assert len(asked) == 1
    sweep.estimate(sweep.read("tiny.yaml", ["train.rank=4,8"]))
    assert [section.rank for section in asked] == [4, 8]


def test_training_through_rounding_takes_more_memory(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tiny model it is a few MB, less than this process itself grows and shrinks from one plan to the next."""
    monkeypatch.setattr("psutil.Process.memory_info", lambda _: SimpleNamespace(rss=1_000_000_000))
    plain = planned("export.target=cpu-int4", until="train")
    rounded = planned("export.target=cpu-int4", "train.quantization_aware=true", until="train")
    assert not wrong(plain) and not wrong(rounded)
    memory = [found["stages"][-1]["memory_mb"] for found in (plain, rounded)]
    assert memory[1] > memory[0]


def test_nothing_is_measured_where_nothing_is_to_be_done(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgetune import plan as planning
    from edgetune.pipeline import Pipeline

    Pipeline(load("tiny.yaml")).run(until="data")

    def measured(*_: Any) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(planning, "estimates", measured)
    found = planned(until="data")
    assert found["stages"][0]["redo"] is False and not wrong(found)
    with pytest.raises(AssertionError, match="measured"):
        planned()


@pytest.mark.parametrize("target", ["cuda-fp16", "cuda-bf16", "qnn-npu"])
def test_targets_for_other_devices_can_be_planned(project: Path, target: str) -> None:
    found = planned(f"export.target={target}")
    assert found["stages"][3]["disk_mb"] > 0 and not wrong(found)
