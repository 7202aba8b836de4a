"""What an export takes is known beforehand, and too little of it is refused before anything is done."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import edgetune, write_jsonl
from edgetune import files
from edgetune.errors import InputError
from edgetune.estimate import _measuring
from edgetune.export import decoder, needs
from edgetune.export.quantize.calibrate import quantize_model
from edgetune.export.targets import load_target
from edgetune.models import resolve
from edgetune.pipeline import Pipeline
from edgetune.recipe import ExportSection, ModelSection
from edgetune.recipe_file import load
from edgetune.runtime import hardware
from edgetune.standalone import export_model


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_memory", lambda: (100_000_000, 90_000_000))


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=40_000_000))


def nothing_in(folder: Path) -> bool:
    return {path.name for path in folder.iterdir()} <= {"edgetune-home"}


def test_the_size_is_that_of_the_grids(tiny_model: Path) -> None:
    target = load_target("cpu-int8")
    assert target.quantization is not None
    sizes: dict[str, int] = {}
    quantize_model(
        tiny_model,
        target.quantization.plan(),
        [],
        lambda name, one: sizes.update({name: one.grid.size(*one.codes.shape)}),
    )
    found = needs.needs(tiny_model, target)
    assert found.size == sum(sizes.values()) and found.parameters > found.size / 2
    assert found.seconds > 0 and found.disk > found.size and found.memory > found.size


def test_what_calibrates_or_heals_takes_longer_or_more(tiny_model: Path) -> None:
    rounded, calibrated = (needs.needs(tiny_model, load_target(name)) for name in ("cpu-int8", "cpu-int4"))
    assert calibrated.seconds > rounded.seconds
    assert needs.needs(tiny_model, load_target("cuda-fp16")).size == 2 * rounded.parameters
    assert needs.needs(tiny_model, load_target("cpu-int4"), steps=9).memory >= calibrated.memory


def test_a_plan_has_the_time_that_auto_measures(tiny_model: Path) -> None:
    base = resolve(ModelSection(id=str(tiny_model)))
    assert _measuring(load_target("cpu-int4"), base, 9000) == 0
    target = load_target("cpu-auto")
    assert target.quantization is not None
    once = _measuring(target, base, 9000)
    more = target.quantization.auto.model_copy(update={"tokens": 40_000_000})
    longer = target.model_copy(update={"quantization": target.quantization.model_copy(update={"auto": more})})
    assert 10 < once < _measuring(longer, base, 9000)


def test_too_little_memory_is_said_before_the_export(
    tiny_model: Path, tmp_path: Path, small_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "write_checkpoint", lambda *_, **__: pytest.fail("it has begun"))
    with pytest.raises(InputError, match=r"about .* MB of memory, 90 MB are there") as caught:
        export_model(tiny_model, tmp_path / "out", ExportSection())
    assert caught.value.exit_code == 2 and nothing_in(tmp_path)


def test_too_little_disk_is_said_before_the_export(
    tiny_model: Path, tmp_path: Path, full_disk: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "write_checkpoint", lambda *_, **__: pytest.fail("it has begun"))
    with pytest.raises(InputError, match="MB of disk, 40 MB are free"):
        export_model(tiny_model, tmp_path / "out", ExportSection())
    assert nothing_in(tmp_path)


@pytest.mark.parametrize("short_of", ["small_memory", "full_disk"])
def test_a_run_does_not_train_what_it_cannot_export(
    tiny_model: Path,
    tmp_path: Path,
    tiny_rows: list[dict[str, Any]],
    short_of: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", tiny_rows)
    (tmp_path / "tiny.yaml").write_text(f"model: {{id: {tiny_model}}}\ndata: {{train: rows.jsonl}}\n")
    request.getfixturevalue(short_of)
    with pytest.raises(InputError, match="the export needs about"):
        Pipeline(load("tiny.yaml", [])).run()
    assert not list(tmp_path.glob("runs/*/*"))


def test_a_plan_knows_targets_of_every_precision(tiny_model: Path, tmp_path: Path, tiny_rows: list[Any]) -> None:
    write_jsonl(tmp_path / "rows.jsonl", tiny_rows)
    (tmp_path / "tiny.yaml").write_text(
        f"model: {{id: {tiny_model}}}\ndata: {{train: rows.jsonl}}\ntrain: {{rank: 4, max_steps: 2, samples: 0}}\n"
        "export: {target: cuda-fp16}\n"
    )
    done = edgetune("plan", "tiny.yaml", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    stages = {stage["name"]: stage for stage in json.loads(done.stdout)["stages"]}
    assert stages["export"]["seconds"] > 0 and stages["export"]["memory_mb"] > 0
