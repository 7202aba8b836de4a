"""Sweeps: how values are read, and what is run, kept, shared, failed and carried on; on the tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from conftest import write_jsonl
from edgetune import sweep
from edgetune.errors import EdgetuneError, InputError
from edgetune.pipeline import Pipeline
from edgetune.recipe_file import load
from edgetune.registry import known_runs
from edgetune.run import read_manifest
from edgetune.sweep_report import as_json, plot, table

SETTINGS = """
model: {{id: {model}}}
data: {{train: rows.jsonl, validation: {{auto: 0.25}}}}
train: {{rank: 4, learning_rate: 0.01, max_steps: 2, batch_size: 4, evaluations: 1, samples: 0, threads: 1}}
"""


@pytest.fixture
def project(tmp_path: Path, tiny_model: Path, tiny_rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe and its rows; the working folder of the test."""
    write_jsonl(tmp_path / "rows.jsonl", tiny_rows)
    (tmp_path / "tiny.yaml").write_text(SETTINGS.format(model=tiny_model))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def values(*items: str) -> list[dict[str, Any]]:
    return [point.values for point in sweep.read("tiny.yaml", items).points]


def test_values_between_commas_make_a_grid_in_the_order_they_are_given(project: Path) -> None:
    found = sweep.read("tiny.yaml", ["train.rank=8,16", "train.learning_rate=1e-4,2e-4", "train.epochs=3", "name=grid"])
    assert [(p.values["train.rank"], p.values["train.learning_rate"]) for p in found.points] == [
        (8, 1e-4),
        (8, 2e-4),
        (16, 1e-4),
        (16, 2e-4),
    ]
    assert {p.loaded.recipe.train.epochs for p in found.points} == {3}
    assert found.axes == {"train.rank": [8, 16], "train.learning_rate": [1e-4, 2e-4]}
    assert found.points[0].loaded.run_dir == Path("runs/grid-sweep/rank-8--learning_rate-0.0001")
    assert len({p.loaded.run_dir for p in found.points}) == 4


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ("train.rank=[8,16]", [8, 16]),
        ("train.rank=[8, 16]", [8, 16]),
        ("train.target_modules=all-linear,[q_proj,v_proj]", ["all-linear", ["q_proj", "v_proj"]]),
        ("train.target_modules=[[q_proj], [q_proj, v_proj]]", [["q_proj"], ["q_proj", "v_proj"]]),
        ("train.early_stopping=null,{patience: 1, min_delta: 0.1}", [None, {"patience": 1, "min_delta": 0.1}]),
        ("train.neftune_alpha=null,5", [None, 5]),
        ("model.revision='a, b',\"c,d\"", ["a, b", "c,d"]),
        ("seed=1,2", [1, 2]),
    ],
)
def test_values_are_read_as_people_write_them(project: Path, item: str, expected: list[Any]) -> None:
    key = item.partition("=")[0]
    assert [found[key] for found in values(item, "train.evaluations=3")] == expected


def test_a_list_is_one_value_where_the_key_takes_one(project: Path) -> None:
    found = sweep.read("tiny.yaml", ["train.target_modules=[q_proj,v_proj]", "train.rank=8,16"])
    assert list(found.axes) == ["train.rank"]
    assert all(p.loaded.recipe.train.target_modules == ["q_proj", "v_proj"] for p in found.points)


def test_every_point_has_a_folder_of_its_own_that_is_a_run_name(project: Path) -> None:
    long = [f"a/{'x' * 60}{n}" for n in range(2)]
    items = [f"model.revision={','.join(long)}", "model.chat_template=a/b.jinja,c/b.jinja", "train.alpha=8,16.5"]
    names = [p.loaded.run_dir.name for p in sweep.read("tiny.yaml", items).points]
    assert len({name.casefold() for name in names}) == 8 and max(map(len, names)) <= 100
    assert names == [p.loaded.run_dir.name for p in sweep.read("tiny.yaml", items).points]


@pytest.mark.parametrize(
    ("items", "said"),
    [
        (["train.rnk=8,16"], "there is no key `train.rnk`"),
        (["train.rank=8,many"], "`train.rank`"),
        (["train.rank=8"], "several values"),
        ([], "several values"),
        (["train.rank=8,"], "missing at a comma"),
        (["train.rank=8,,16"], "not valid YAML"),
        (["train.rank=8,8"], "same point twice"),
        (["train.learning_rate=1e-4,0.0001"], "same point twice"),
        (["train.rank=8,16", "train.rank=4"], "stands twice"),
        (["train.rank=8,", "16"], "missing at a comma"),
        (["train.rank=8", "16"], "without spaces"),
        (["export.target=cpu-int8,cpu-int4"], "no part in training"),
        (["name=a,b"], "no part in training"),
        (["train.rank=8,16", "train.distributed.engine=ddp"], "in one process"),
        (["train.evaluations=1,4", "train.early_stopping={patience: 2}"], "could never stop"),
    ],
)
def test_what_is_no_sweep_is_refused(project: Path, items: list[str], said: str) -> None:
    with pytest.raises(InputError) as caught:
        sweep.read("tiny.yaml", items)
    assert said in str(caught.value) and "fix:" in str(caught.value)


def swept(*items: str, until: str = "train") -> sweep.Sweep:
    found = sweep.read("tiny.yaml", items)
    sweep.run(found, until)
    return found


def test_points_are_trained_compared_kept_and_the_best_alone_is_merged(project: Path) -> None:
    grid = ["train.learning_rate=1e-5,0.02", "train.rank=2"]
    first = swept(*grid)
    losses = [point.loss for point in first.points]
    assert losses[1] < losses[0], "the higher rate learns more in two steps"
    best = first.best()
    assert best and best.loss == min(losses) and first.comparable
    folder = project / "runs/tiny-sweep"
    told = json.loads((folder / "sweep.json").read_text())
    assert [p["validation"]["after"]["loss"] for p in told["points"]] == sorted(losses)
    assert told["best"]["values"] == best.values and told["format"] == "edgetune/sweep/1"
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    columns, rows = table(first)
    assert columns[:2] == ["learning_rate", "validation loss"] and len(rows) == 2
    assert float(rows[0][1]) == round(min(losses), 4) and {len(row) for row in rows} == {len(columns)}

    sealed = [read_manifest(p.loaded.run_dir / "adapter") for p in first.points]
    again = swept(*grid)
    assert [read_manifest(p.loaded.run_dir / "adapter") for p in again.points] == sealed, "nothing is trained twice"
    assert [p.loss for p in again.points] == losses

    told = sweep.estimate(sweep.read("tiny.yaml", ["train.learning_rate=1e-5,0.5", "train.rank=2"]))
    assert [point["state"] for point in told] == ["trained already", "to be trained"]
    assert told[0]["seconds"] == 0 and not any(point["problems"] for point in told)

    assert sweep.carry_on(again, "train") is None
    result = sweep.carry_on(again, "merge")
    assert result and result.path == best.loaded.run_dir and result.done["train"] is None
    assert list(folder.glob("*/merged")) == [best.loaded.run_dir.absolute() / "merged"]
    assert {run.name for run in known_runs()} == {p.loaded.run_dir.name for p in first.points}
    sweep.raise_for_failures(again)


def test_a_point_is_what_the_same_run_alone_gives_and_data_is_shared(project: Path) -> None:
    found = swept("train.rank=2,4")
    alone = Pipeline(load("tiny.yaml", ["train.rank=4"])).run(until="train")
    outputs = [
        read_manifest(folder / "adapter")["outputs"]["adapter_model.safetensors"]["sha256"]
        for folder in (found.points[1].loaded.run_dir, alone.path)
    ]
    assert outputs[0] == outputs[1]
    data = [p.loaded.run_dir / "data/train.jsonl" for p in found.points]
    assert data[0].stat().st_ino == data[1].stat().st_ino
    other = swept("train.rank=2,4", "seed=7")
    assert read_manifest(other.points[0].loaded.run_dir / "data")["options"]["seed"] == 7, "other data is not reused"


def test_a_point_that_fails_is_told_and_the_others_go_on(project: Path) -> None:
    found = swept("train.target_modules=[[q_prj], [q_proj]]")
    bad, good = found.points
    assert bad.error and "q_prj" in bad.error and good.report
    assert found.best() is good
    with pytest.raises(EdgetuneError, match="1 of 2 points failed") as caught:
        sweep.raise_for_failures(found)
    assert caught.value.exit_code == 1 and "q_prj" in str(caught.value)
    assert [row[1] for row in table(found)[1]][1] == "failed"
    states = [point["state"] for point in json.loads(Path("runs/tiny-sweep/sweep.json").read_text())["points"]]
    assert states == ["trained", "failed"]


def test_an_error_of_a_library_ends_one_point_only(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, work: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Pipeline, "_train", broken)
    found = swept("train.rank=2,4")
    assert [p.error for p in found.points] == ["unexpected RuntimeError: mat1 and mat2 shapes cannot be multiplied"] * 2
    assert found.best() is None and sweep.carry_on(found, "merge") is None
    assert as_json(found)["best"] is None


@pytest.mark.parametrize(
    "items",
    [
        ["data.train=rows.jsonl,nowhere.jsonl"],
        ["train.rank=2,4", "model.id=./nowhere"],
        ["train.rank=2,4", "export.target=nothing"],
        ["train.rank=2,4", "model.chat_template=nothing.jinja"],
    ],
)
def test_bad_input_ends_it_before_any_point(project: Path, items: list[str]) -> None:
    found = sweep.read("tiny.yaml", items)
    with pytest.raises((InputError, FileNotFoundError)):
        sweep.run(found)
    assert not list(project.glob("runs/*/*/train"))


def test_what_cannot_be_exported_ends_it_before_any_point(project: Path) -> None:
    for items, said in (
        (["export.target=qnn-npu", "export.max_length=500", "train.rank=2,4"], "500 tokens is no multiple of the 64"),
        (["export.heal.steps=2", "train.rank=2,4"], r"data.train: 12 rows of \d+ tokens are too few to heal on"),
    ):
        found = sweep.read("tiny.yaml", items)
        with pytest.raises(InputError, match=said):
            sweep.run(found, until="export")
        assert not [point for point in found.points if (point.loaded.run_dir / "adapter").exists()]


def test_broken_rows_end_it_before_any_point(project: Path) -> None:
    (project / "broken.jsonl").write_text("{\n")
    found = sweep.read("tiny.yaml", ["data.train=rows.jsonl,broken.jsonl"])
    with pytest.raises(InputError, match=r"broken\.jsonl"):
        sweep.run(found)
    assert not list(project.glob("runs/*/*/train"))


def test_losses_on_different_rows_are_not_called_comparable(project: Path) -> None:
    for items, comparable in ((["seed=1,2"], False), (["train.rank=2,4"], True), (["data.train_on=all,last"], False)):
        found = sweep.read("tiny.yaml", [*items, f"name=n{comparable}"])
        sweep._share_data(sweep._prepared(found, "train"))
        assert (len({sweep._measured_on(point) for point in found.points}) == 1) is comparable


def test_two_sweeps_in_one_folder(project: Path) -> None:
    from edgetune.run import RunFolder

    found = sweep.read("tiny.yaml", ["train.rank=2,4"])
    with RunFolder(found.folder).locked(), pytest.raises(InputError, match="another edgetune process"):
        sweep.run(found)


def test_the_plot_takes_values_of_any_kind(project: Path) -> None:
    found = sweep.read(
        "tiny.yaml", ["train.target_modules=all-linear,[q_proj]", "train.rank=2,4", "train.neftune_alpha=null,5"]
    )
    after = {"loss": 1.5, "perplexity": 4.5, "token_accuracy": 0.6}
    for at, point in enumerate(found.points[:-1]):
        point.report = {"validation": {"after": {**after, "loss": 1.5 - at / 100}}}
    plot(found, project / "plot.png")
    assert (project / "plot.png").stat().st_size > 5000


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on_with_the_same_command(project: Path) -> None:
    """kill -9 while the second point trains: the first is kept, the second goes on, and all is as if nothing happened."""
    items = ["train.rank=2,4", "train.max_steps=16", "train.evaluations=8"]
    code = f"from edgetune import sweep; sweep.run(sweep.read('tiny.yaml', {items!r}))"
    folder = project / "runs/tiny-sweep"
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not list(folder.glob("rank-4/checkpoints/checkpoint-*/complete.json")):
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = read_manifest(folder / "rank-2/adapter")
    assert first and not (folder / "rank-4/adapter").exists()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "resuming after step" in done.stderr
    assert read_manifest(folder / "rank-2/adapter") == first
    alone = Pipeline(load("tiny.yaml", ["train.rank=4", *items[1:]])).run(until="train").path
    assert read_manifest(folder / "rank-4/adapter")["outputs"] == read_manifest(alone / "adapter")["outputs"]
