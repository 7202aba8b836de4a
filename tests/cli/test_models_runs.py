"""`edgetune models` and `edgetune runs`: what they list, what they refuse to delete, what --force does."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from conftest import edgetune
from edgetune.files import write_json
from edgetune.leases import lease, remember_run
from edgetune.models import store
from edgetune.models.base import Base, file_hashes
from edgetune.run import RunFolder, Work, seal


@pytest.fixture
def kept(tiny_model: Path, own_home: Path) -> Path:
    """Folder of a model that is kept."""
    entry = store.entry_for("Tiny model", "abcdef0123456789")
    shutil.copytree(tiny_model, entry)
    store.seal(entry, Base(entry, "package:tiny", "package", "1.0", "mit", file_hashes(entry), "someone/Tiny"))
    return entry


def _run(path: Path, base: Path | None = None, **reports: dict[str, Any]) -> Path:
    write_json(path / "recipe.json", {"model": {"id": "x"}, "data": {}})
    run = RunFolder(path)
    _export(path, "weights")
    for stage, report in reports.items():
        write_json(path / stage / "report.json", report)
        for folder in run.folders(stage):
            folder.mkdir(exist_ok=True)
            seal(folder, Work(stage, {"artifact": run.content("export")}, {}))
    remember_run(path, base)
    return path


def _export(path: Path, content: str) -> None:
    write_json(path / "artifact" / "model.json", content)
    seal(path / "artifact", Work("export", {}, {}))


def _json(*args: str | Path) -> Any:
    done = edgetune(*args, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_models_ls_and_show(kept: Path, tmp_path: Path) -> None:
    assert kept.name == "Tiny-model-abcdef012345"
    (entry,) = _json("models", "ls")
    assert (entry["name"], entry["id"], entry["license"], entry["path"]) == (
        kept.name,
        "package:tiny",
        "mit",
        str(kept),
    )
    assert entry["used_by"] == []
    assert entry["size_mb"] > 0
    run = _run(tmp_path / "run", kept)
    assert _json("models", "show", "package:tiny")["used_by"] == [f"run {run}"]
    assert _json("models", "show", "someone/Tiny")["facts"]["model_type"] == "llama"
    plain = edgetune("models", "show", kept)
    assert "licence" in plain.stdout
    assert "mit" in plain.stdout
    table = edgetune("models", "ls")
    assert kept.name in table.stdout
    assert table.stderr == ""


def test_half_made_models_are_not_listed(kept: Path) -> None:
    (kept / "manifest.json").unlink()
    assert _json("models", "ls") == []
    empty = edgetune("models", "ls")
    assert (empty.returncode, "no models" in empty.stdout) == (0, True)


def test_models_rm_refuses_what_a_run_is_built_on(kept: Path, tmp_path: Path) -> None:
    run = _run(tmp_path / "run", kept)
    refused = edgetune("models", "rm", kept.name)
    assert refused.returncode == 2
    assert str(run) in refused.stderr
    assert kept.is_dir()
    assert _json("models", "rm", kept.name, "--force")["deleted"] == str(kept)
    assert not kept.exists()
    assert list(kept.parent.iterdir()) == []


def test_models_rm_refuses_what_a_process_uses(kept: Path) -> None:
    with lease(kept, "edgetune run"):
        refused = edgetune("models", "rm", "package:tiny")
        assert refused.returncode == 2
        assert f"process {os.getpid()} (edgetune run)" in refused.stderr
    done = edgetune("models", "rm", "package:tiny")
    assert (done.returncode, kept.exists()) == (0, False)
    assert "MB freed" in done.stdout
    absent = edgetune("models", "rm", "package:tiny")
    assert absent.returncode == 2
    assert "no model package:tiny" in absent.stderr


def test_models_rm_waits_for_no_conversion(kept: Path) -> None:
    with store.locked(kept):
        refused = edgetune("models", "rm", kept.name)
    assert refused.returncode == 2
    assert "another edgetune process" in refused.stderr
    assert kept.is_dir()


def test_models_rm_of_a_hub_model(tiny_model: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--org--tiny"
    snapshot, blobs = repository / "snapshots" / commit, repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in tiny_model.iterdir():
        shutil.copy(file, blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    base = Base(snapshot, "org/tiny", "hub", commit, None, file_hashes(snapshot), "org/tiny")
    store.record(store.entry_for("org--tiny", commit), base)
    assert _json("models", "rm", "org/tiny")["freed_mb"] > 0
    assert not snapshot.exists()
    assert _json("models", "ls") == []


def test_runs_ls_and_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = {"loss": {"before": 2.5, "after": 1.25}, "history": [1, 2]}
    first = _run(tmp_path / "far" / "first", train=train, verify={"passed": False, "kld_mean": 0.44})
    (tmp_path / "runs" / "second").mkdir(parents=True)
    write_json(tmp_path / "runs" / "second" / "recipe.json", {"model": {}, "data": {}})
    (tmp_path / "runs" / "no-run").mkdir()
    monkeypatch.chdir(tmp_path)
    runs = {run["name"]: run for run in _json("runs", "ls")}
    assert set(runs) == {"first", "second"}
    assert runs["first"]["stages"] == ["train", "export", "verify"]
    assert (runs["first"]["passed"], runs["second"]["passed"]) == (False, None)
    shown = _json("runs", "show", "first")
    assert shown["reports"]["verify"]["kld_mean"] == 0.44
    assert "bench" not in shown["reports"]
    plain = edgetune("runs", "show", first)
    assert "train: loss.after" in plain.stdout
    assert "NOT passed" in plain.stdout
    (first / "verify" / "report.json").write_text("{broken")
    assert _json("runs", "show", first)["passed"] is None


def test_only_the_artifact_that_was_verified_is_said_to_have_passed(tmp_path: Path) -> None:
    run = _run(tmp_path / "runs" / "quick", verify={"passed": True}, bench={"ttft_ms": 3})
    shown = _json("runs", "show", run)
    assert (shown["passed"], shown["stages"]) == (True, ["export", "verify", "bench"])
    _export(run, "other weights")
    shown = _json("runs", "show", run)
    assert (shown["passed"], shown["stages"], shown["reports"]) == (None, ["export"], {})
    manifest = run / "artifact" / "manifest.json"
    for broken in ("{", "[]", json.dumps(json.loads(manifest.read_text()) | {"outputs": [1]})):
        manifest.write_text(broken)
        assert _json("runs", "show", run)["passed"] is None
    shutil.rmtree(run / "artifact")
    assert _json("runs", "show", run)["passed"] is None
    (entry,) = _json("runs", "ls")
    assert (entry["passed"], entry["stages"]) == (None, [])


def test_runs_rm_refuses_a_run_under_way(tmp_path: Path) -> None:
    run = _run(tmp_path / "run")
    with FileLock(run / ".lock"):
        refused = edgetune("runs", "rm", run)
        assert refused.returncode == 2
        assert "another edgetune process works in it" in refused.stderr
        assert run.is_dir()
        forced = edgetune("runs", "rm", run, "--force")
    assert (forced.returncode, run.exists()) == (0, False), forced.stderr


def test_runs_rm(tmp_path: Path) -> None:
    run = _run(tmp_path / "runs" / "quick", train={})
    with lease(run / "artifact", "edgetune serve"):
        refused = edgetune("runs", "rm", "quick")
        assert refused.returncode == 2
        assert f"process {os.getpid()} (edgetune serve)" in refused.stderr
        assert run.is_dir()
    done = edgetune("runs", "rm", "quick")
    assert done.returncode == 0
    assert "MB freed" in done.stdout
    assert list((tmp_path / "runs").iterdir()) == []
    assert _json("runs", "ls") == []


def test_runs_rm_refuses_what_another_run_is_built_on(tmp_path: Path) -> None:
    first = _run(tmp_path / "first")
    (first / "merged").mkdir()
    second = _run(tmp_path / "second", first / "merged")
    refused = edgetune("runs", "rm", first)
    assert refused.returncode == 2
    assert str(second) in refused.stderr
    assert first.is_dir()
    assert edgetune("runs", "rm", first, "--force").returncode == 0
    assert not first.exists()


def test_runs_rm_deletes_nothing_but_runs(tmp_path: Path) -> None:
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    run = _run(tmp_path / "run")
    link = tmp_path / "link"
    link.symlink_to(run)
    cooking = tmp_path / "cooking"
    write_json(cooking / "recipe.json", {"eggs": 2})
    for name, message in {
        folder: "no run folder",
        cooking: "no run folder",
        link: "is a link",
        "nothing": "no run nothing",
    }.items():
        for force in ([], ["--force"]):
            refused = edgetune("runs", "rm", name, *force)
            assert refused.returncode == 2
            assert message in refused.stderr
    assert (folder / "thesis.txt").is_file()
    assert cooking.is_dir()
    assert run.is_dir()


def test_two_runs_of_one_name(tmp_path: Path) -> None:
    for parent in ("a", "b"):
        _run(tmp_path / parent / "same")
    refused = edgetune("runs", "rm", "same")
    assert refused.returncode == 2
    assert str(tmp_path / "a" / "same") in refused.stderr


@pytest.mark.parametrize("command", ["ls", "show", "rm"])
@pytest.mark.parametrize("group", ["models", "runs"])
def test_help_has_examples(group: str, command: str) -> None:
    text = edgetune(group, command, "--help").stdout
    assert "Examples:" in text
    assert f"edgetune {group} {command}" in text
    assert "--json" in text
