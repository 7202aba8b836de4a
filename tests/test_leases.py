"""Leases: the living hold, the dead do not, whatever number they had."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from edgetune.leases import forget_run, holders, lease, remember_run, remembered_runs

HOLD = """
import sys, time
from pathlib import Path
from edgetune.leases import lease
with lease(Path(sys.argv[1]), "edgetune serve"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_who_is_told(tmp_path: Path, own_home: Path) -> None:
    run, artifact, other = tmp_path / "run", tmp_path / "run" / "artifact", tmp_path / "run2"
    with lease(artifact, "edgetune chat"):
        for asked in (artifact, run, artifact / "model.onnx"):
            found = holders(asked)
            assert [(x.pid, x.what, x.path) for x in found] == [(os.getpid(), "edgetune chat", str(artifact))]
        assert holders(other) == []
    assert holders(artifact) == []
    assert list((own_home / "leases").iterdir()) == []


def test_released_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x"), lease(tmp_path, "a"):
        raise ValueError("x")
    assert holders(tmp_path) == []


def test_killed_holder_is_dead(tmp_path: Path, own_home: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        assert [(x.pid, x.what) for x in holders(tmp_path)] == [(child.pid, "edgetune serve")]
    finally:
        child.kill()
    psutil.Process(child.pid)  # a zombie until it is waited for
    assert _eventually_none(tmp_path)
    child.wait()
    assert list((own_home / "leases").iterdir()) == []


def _eventually_none(path: Path) -> bool:
    for _ in range(100):
        if not holders(path):
            return True
        threading.Event().wait(0.05)
    return False


def test_reused_pid_is_not_alive(tmp_path: Path, own_home: Path) -> None:
    with lease(tmp_path, "edgetune serve"):
        file = next((own_home / "leases").iterdir())
        known = json.loads(file.read_text())
        file.write_text(json.dumps(known | {"started": known["started"] - 3600}))
        assert holders(tmp_path) == []
        assert not file.exists()


def test_strange_files_are_left_alone(tmp_path: Path, own_home: Path) -> None:
    folder = own_home / "leases"
    folder.mkdir(parents=True)
    for name, text in {"a.json": "{", "b.json": "[]", "c.json": '{"pid": "x"}'}.items():
        (folder / name).write_text(text)
    assert holders(tmp_path) == []
    assert len(list(folder.iterdir())) == 3


def test_home_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGETUNE_HOME", str(tmp_path / "file" / "home"))
    with lease(tmp_path, "edgetune serve"):
        assert holders(tmp_path) == []


def test_runs_are_remembered(tmp_path: Path) -> None:
    run, base = tmp_path / "run", tmp_path / "base"
    run.mkdir()
    remember_run(run, None)
    remember_run(run, base)
    assert [(r.path, r.base) for r in remembered_runs()] == [(run, base)]
    forget_run(run)
    assert remembered_runs() == []
    remember_run(run, base)
    run.rmdir()
    assert remembered_runs() == [], "a run that is gone is not remembered"


def test_remembering_at_once_loses_none(tmp_path: Path) -> None:
    runs = [tmp_path / f"run{n}" for n in range(12)]
    for run in runs:
        run.mkdir()
    threads = [threading.Thread(target=remember_run, args=(run, None)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(remembered_runs()) == 12


def test_broken_memory_is_no_error(tmp_path: Path, own_home: Path) -> None:
    own_home.mkdir(parents=True)
    for text in ("{", "[]", '{"/": 3}', '{"/": null}'):
        (own_home / "runs.json").write_text(text)
        assert remembered_runs() == []
