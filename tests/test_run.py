"""The run folder: when a stage is fresh, and what is said when it is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edgetune.errors import InputError
from edgetune.files import write_json, write_text
from edgetune.run import RunFolder, Work, outputs, read_manifest, seal


def done(run: RunFolder, work: Work) -> None:
    for folder in run.folders(work.stage):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "file.txt", folder.name)
        seal(folder, work)


WORK = Work("train", {"base": "b", "data": "d"}, {"rank": 16, "epochs": 1})


def test_fresh_when_nothing_changed(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.stale(WORK) == "not done yet"
    done(run, WORK)
    assert run.stale(WORK) is None
    assert RunFolder(tmp_path).stale(Work("train", {"data": "d", "base": "b"}, {"epochs": 1, "rank": 16})) is None


@pytest.mark.parametrize(
    ("work", "why"),
    [
        (Work("train", {"base": "c", "data": "d"}, WORK.options), "its base changed"),
        (Work("train", WORK.inputs, {"rank": 8, "epochs": 1}), "rank changed from 16 to 8"),
    ],
)
def test_says_what_changed(tmp_path: Path, work: Work, why: str) -> None:
    run = RunFolder(tmp_path)
    done(run, WORK)
    assert run.stale(work) == why


def test_a_changed_missing_or_added_file_makes_it_stale(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for change in ("edit", "remove", "add"):
        done(run, WORK)
        path = tmp_path / "adapter" / "file.txt"
        if change == "edit":
            path.write_text("other!!")
        elif change == "remove":
            path.unlink()
        else:
            (tmp_path / "adapter" / "new.txt").write_text("x")
        assert "not as it was written" in str(run.stale(WORK))
        (tmp_path / "adapter" / "new.txt").unlink(missing_ok=True)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "other"}'])
def test_a_broken_manifest_means_not_done(tmp_path: Path, text: str) -> None:
    run = RunFolder(tmp_path)
    done(run, WORK)
    (tmp_path / "adapter" / "manifest.json").write_text(text)
    assert run.stale(WORK) is not None
    assert read_manifest(tmp_path / "adapter") == {}


def test_reports_and_cards_are_not_content(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    done(run, WORK)
    before = run.content("train")
    write_json(tmp_path / "adapter" / "report.json", {"seconds": 3})
    seal(tmp_path / "adapter", WORK)
    assert run.content("train") == before
    write_text(tmp_path / "adapter" / "file.txt", "other")
    seal(tmp_path / "adapter", WORK)
    assert run.content("train") != before


def test_manifest_lists_hash_and_size(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "abc")
    assert outputs(tmp_path) == {
        "a": {"sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", "bytes": 3}
    }


def test_two_processes_do_not_share_a_run(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from edgetune.run import RunFolder\nwith RunFolder(Path(sys.argv[1])).locked(): pass"
    with RunFolder(tmp_path / "run").locked():
        second = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True, check=False
        )
        assert second.returncode != 0 and "another edgetune process" in second.stderr
    third = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True, check=False
    )
    assert third.returncode == 0, third.stderr
    with (
        RunFolder(tmp_path / "run").locked(),
        pytest.raises(InputError),
        RunFolder(tmp_path / "run").locked(),
    ):
        pass
