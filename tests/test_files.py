"""Files are whole or absent."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgetune import files
from edgetune.errors import InputError, from_system_error


def test_write_replaces_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.json"
    files.write_json(path, {"ä": 1})
    files.write_json(path, {"ä": 2})
    assert files.read_json(path) == {"ä": 2}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    files.write_text(path, "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as caught:
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(files.TMP_PREFIX)] == []
    explained = from_system_error(caught.value)
    assert (
        explained is not None
        and explained.exit_code == 2
        and "disk is full" in str(explained)
        and str(path) in str(explained)
    )


def test_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "a.json", {"x": float("nan")})
    assert list(tmp_path.glob("*.json")) == []


def test_staged_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    final = tmp_path / "out"
    with files.staged_folder(final) as staged:
        (staged / "a").write_text("1")
        assert not final.exists()
    assert (final / "a").read_text() == "1"
    with pytest.raises(RuntimeError), files.staged_folder(final) as staged:
        (staged / "b").write_text("2")
        raise RuntimeError
    assert [p.name for p in final.iterdir()] == ["a"]
    with files.staged_folder(final) as staged:
        (staged / "c").write_text("3")
    assert [p.name for p in final.iterdir()] == ["c"]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(files.TMP_PREFIX)] == []


def test_a_link_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="link"), files.staged_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "elsewhere").is_dir()


def test_kill_9_leaves_only_what_is_cleaned_up(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from edgetune.files import staged_folder\n"
        "with staged_folder(Path(sys.argv[1])) as f:\n"
        "    (f / 'half').write_text('x'); print('ready', flush=True); time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert child.stdout and child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.iterdir())) == 1 + (tmp_path / "edgetune-home").exists()
    files.remove_leftovers(tmp_path)
    assert [p for p in tmp_path.iterdir() if p.name != "edgetune-home"] == []


def test_hash_cache_sees_every_kind_of_change(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("one")
    first = files.HashCache()
    value = first.file(path)
    first.save()
    assert files.HashCache().file(path) == value == files.sha256_file(path)
    path.write_text("two")
    os.utime(path, ns=(time.time_ns(), time.time_ns() + 1))
    assert files.HashCache().file(path) == files.sha256_file(path) != value


def test_a_broken_hash_cache_is_no_error(tmp_path: Path) -> None:
    files.home().mkdir(parents=True)
    (files.home() / "hashes.json").write_text("{nonsense")
    (tmp_path / "a").write_text("x")
    assert files.HashCache().file(tmp_path / "a") == files.sha256_file(tmp_path / "a")


def test_too_little_disk_is_said_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs about"):
        files.require_space(tmp_path / "not" / "there", 10**18, "the test")
    files.require_space(tmp_path, 1, "the test")


def test_digest_does_not_depend_on_key_order() -> None:
    assert files.digest({"a": 1, "b": [2]}) == files.digest({"b": [2], "a": 1}) != files.digest({"a": 1, "b": [3]})
