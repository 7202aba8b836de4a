"""Trackers with the real libraries: what is in their files, after a resume too, and what happens when one fails."""

from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgetune.errors import InputError
from edgetune.train import trackers

ROWS: list[dict[str, Any]] = [
    {"step": 0, "validation_loss": 2.0, "validation_perplexity": 7.4, "validation_token_accuracy": 0.5},
    *(
        {"step": step, "loss": 2 - step / 10, "grad_norm": 1.0, "learning_rate": 1e-4, "tokens": 300, "seconds": 1.5}
        for step in range(1, 5)
    ),
    {"step": 4, "validation_loss": 1.6, "validation_perplexity": 5.0, "validation_token_accuracy": 0.6},
]
FIRST = SimpleNamespace(is_world_process_zero=True)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opens a connection fails; a token lies there that a library might use."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "bind", refuse)
    monkeypatch.setenv("HF_TOKEN", "hf_nothing")
    monkeypatch.setenv("TRACKIO_SPACE_ID", "someone/space")


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("trackio")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    return tmp_path / "trackio"


def go(callback: Any, metrics: list[dict[str, Any]], rows: list[dict[str, Any]], *, end: bool = True) -> None:
    """What Trainer does: begin, a log after each row, end."""
    callback.on_train_begin(None, FIRST, None)
    for row in rows:
        metrics.append(row)
        callback.on_log(None, FIRST, None, logs={})
    if end:
        callback.on_train_end(None, FIRST, None)


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(folder.glob("events.out.*")):
        for event in loading.EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.tensor.float_val:
                    found.setdefault(value.tag, []).append((event.step, round(value.tensor.float_val[0], 4)))
    return found


def sent(run: str) -> list[dict[str, Any]]:
    from trackio.sqlite_storage import SQLiteStorage

    found = [record["id"] for record in SQLiteStorage.get_run_records(trackers.PROJECT) if record["name"] == run]
    assert len(found) == 1
    return SQLiteStorage.get_logs(trackers.PROJECT, run, run_id=found[0])


def test_tensorboard_has_every_number_once_also_after_a_resume(tmp_path: Path) -> None:
    metrics: list[dict[str, Any]] = []
    (callback,) = trackers.callbacks(["tensorboard"], "run", tmp_path, {"train": {"rank": 4}}, metrics)
    go(callback, metrics, ROWS[:4], end=False)  # killed after step 3, with the last checkpoint at step 2
    assert [step for step, _ in events(tmp_path / "tensorboard")["train/loss"]] == [1, 2, 3], "on disk at once"
    kept = ROWS[:3]
    (callback,) = trackers.callbacks(["tensorboard"], "run", tmp_path, {}, kept)
    go(callback, kept, ROWS[3:])
    assert events(tmp_path / "tensorboard") == {
        "train/loss": [(1, 1.9), (2, 1.8), (3, 1.7), (4, 1.6)],
        "train/learning_rate": [(step, 1e-4) for step in range(1, 5)],
        "train/grad_norm": [(step, 1.0) for step in range(1, 5)],
        "train/tokens_per_s": [(step, 200.0) for step in range(1, 5)],
        "validation/loss": [(0, 2.0), (4, 1.6)],
        "validation/perplexity": [(0, 7.4), (4, 5.0)],
        "validation/token_accuracy": [(0, 0.5), (4, 0.6)],
    }


def test_trackio_has_every_number_once_also_after_a_resume(
    database: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics: list[dict[str, Any]] = []
    (callback,) = trackers.callbacks(["trackio"], "run", tmp_path / "a", {"train": {"rank": 4}}, metrics)
    go(callback, metrics, ROWS[:4], end=False)
    assert [row["step"] for row in sent("run")] == [0, 1, 2, 3]
    kept = ROWS[:3]
    (callback,) = trackers.callbacks(["trackio"], "run", tmp_path / "a", {"train": {"rank": 4}}, kept)
    go(callback, kept, ROWS[3:])
    rows = sent("run")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 4]
    assert rows[1]["train/loss"] == 1.9 and rows[1]["train/tokens_per_s"] == 200 and rows[-1]["validation/loss"] == 1.6
    assert (database / "edgetune.db").is_file()
    assert capsys.readouterr() == ("", ""), "stdout is left to results"


def test_two_run_folders_of_one_name_do_not_mix(database: Path, tmp_path: Path) -> None:
    from trackio.sqlite_storage import SQLiteStorage

    for folder in ("a", "b"):
        metrics: list[dict[str, Any]] = []
        (callback,) = trackers.callbacks(["trackio"], "run", tmp_path / folder, {}, metrics)
        go(callback, metrics, ROWS[:2])
    assert len(SQLiteStorage.get_run_records(trackers.PROJECT)) == 2


def test_a_tracker_that_fails_is_said_once_and_the_other_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], database: Path
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk is full")

    metrics: list[dict[str, Any]] = []
    (callback,) = trackers.callbacks(["trackio", "tensorboard"], "run", tmp_path, {}, metrics)
    monkeypatch.setattr("trackio.sqlite_storage.SQLiteStorage.bulk_log", full)
    go(callback, metrics, ROWS)
    said = capsys.readouterr().err
    assert said.count("warning") == 1 and "trackio gets no more metrics (OSError: disk is full)" in said
    assert len(events(tmp_path / "tensorboard")["train/loss"]) == 4


def test_a_tracker_that_cannot_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    metrics: list[dict[str, Any]] = []
    (callback,) = trackers.callbacks(["tensorboard"], "run", tmp_path, {}, metrics)
    go(callback, metrics, ROWS)
    assert capsys.readouterr().err.count("warning: tensorboard") == 1


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    (callback,) = trackers.callbacks(["tensorboard"], "run", tmp_path, {}, ROWS)
    callback.on_train_begin(None, SimpleNamespace(is_world_process_zero=False), None)
    callback.on_train_end(None, SimpleNamespace(is_world_process_zero=False), None)
    assert not (tmp_path / "tensorboard").exists()


def test_a_missing_library_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "trackio" else object())
    with pytest.raises(InputError, match=r"train\.trackers: trackio is not installed") as caught:
        trackers.callbacks(["tensorboard", "trackio"], "run", tmp_path, {}, [])
    assert "edgetune[trackers]" in str(caught.value)
    assert trackers.callbacks([], "run", tmp_path, {}, []) == []


def test_a_real_trainer_calls_them(tmp_path: Path) -> None:
    """The callbacks' place in transformers' Trainer: behind the one that records."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    metrics: list[dict[str, Any]] = []

    class Records(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                metrics.append({"step": state.global_step, "loss": logs["loss"]})

    class Model(torch.nn.Linear):
        def forward(self, x: Any) -> Any:
            return {"loss": super().forward(x).square().mean()}

    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, logging_steps=1, report_to=[], disable_tqdm=True, save_strategy="no", use_cpu=True
    )
    found = trackers.callbacks(["tensorboard"], "run", tmp_path, {}, metrics)
    rows = [{"x": torch.ones(2)} for _ in range(24)]
    Trainer(Model(2, 1), arguments, train_dataset=rows, callbacks=[Records(), *found]).train()
    assert [step for step, _ in events(tmp_path / "tensorboard")["train/loss"]] == [1, 2, 3]
