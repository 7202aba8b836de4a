"""Files are whole or absent."""

from __future__ import annotations

import errno
import importlib.util
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgetune import files
from edgetune.errors import EXTRAS, InputError, from_system_error, need, require_extra


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


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),  # torch.save
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),  # safetensors
        OSError(errno.EDQUOT, "Disk quota exceeded"),
    ],
)
def test_a_full_disk_is_known_in_the_words_of_every_library(error: Exception) -> None:
    explained = from_system_error(error)
    assert explained is not None and explained.exit_code == 2 and "disk is full" in str(explained)
    assert from_system_error(RuntimeError("something else")) is None


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


def test_what_a_killed_deletion_left_goes_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two", ".tmp-of-the-person-deleted"):
        files.write_text(tmp_path / name / "a", "12345")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files.shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        files.delete_folder(tmp_path / "one")
    assert not (tmp_path / "one").exists() and len(list(tmp_path.iterdir())) == 3
    assert files.delete_folder(tmp_path / "two") == 5
    assert [path.name for path in tmp_path.iterdir()] == [".tmp-of-the-person-deleted"]


def test_sizes_of_folders_that_vanish_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "c"):
        files.write_text(tmp_path / "top" / name / "file", "12345")
    (tmp_path / "top" / "link").symlink_to(tmp_path / "top" / "a" / "file")
    (tmp_path / "top" / "folder-link").symlink_to(tmp_path / "top" / "a")
    assert files.folder_size(tmp_path / "top") == 15
    look, gone = os.scandir, []

    def scandir(path: object) -> object:
        if Path(str(path)).parent.name == "top" and not gone:  # the first folder that is looked into: all go
            for name in ("a", "b", "c"):
                files.shutil.rmtree(tmp_path / "top" / name)
            gone.append(path)
        return look(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert files.folder_size(tmp_path / "top") == 0
    assert gone


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


def _never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "sha256_file", lambda path: pytest.fail(f"{path} was read again"))


def test_hash_caches_do_not_lose_each_others_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caches = [files.HashCache(), files.HashCache()]
    for index, cache in enumerate(caches):
        (tmp_path / f"{index}").write_text(f"{index}")
        cache.file(tmp_path / f"{index}")
    for cache in caches:
        cache.save()
    _never_read(monkeypatch)
    for index in range(2):
        files.HashCache().file(tmp_path / f"{index}")


def test_hashes_of_a_staged_folder_are_known_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with files.staged_folder(tmp_path / "out") as staged:
        (staged / "weights").write_text("1")
        (staged / "config.json").write_text("2")
        hashes = files.HashCache().folder(staged)
    _never_read(monkeypatch)
    assert files.HashCache().folder(tmp_path / "out") == hashes


def test_another_file_in_the_place_and_with_the_time_of_one_that_is_gone(tmp_path: Path) -> None:
    for text in ("one", "two", "six"):  # of one size and time; the file system gives the inode again
        (tmp_path / "a").write_text(text)
        os.utime(tmp_path / "a", ns=(1, 1))
        assert files.HashCache().folder(tmp_path)["a"] == files.sha256_file(tmp_path / "a")
        (tmp_path / "a").unlink()


def test_a_busy_hash_cache_is_not_waited_for(tmp_path: Path) -> None:
    from filelock import FileLock

    files.home().mkdir(parents=True)
    (tmp_path / "a").write_text("x")
    with FileLock(files.home() / "hashes.json.lock"):
        start = time.monotonic()
        files.HashCache().folder(tmp_path)
        assert time.monotonic() - start < 30  # the lock is held until then: waiting would never end


@pytest.mark.parametrize("text", ["{nonsense", "[]", '{"/a": [1, 2, 3, "x"]}'])
def test_a_broken_hash_cache_is_no_error(tmp_path: Path, text: str) -> None:
    files.home().mkdir(parents=True)
    (files.home() / "hashes.json").write_text(text)
    (tmp_path / "a").write_text("x")
    assert files.HashCache().folder(tmp_path)["a"] == files.sha256_file(tmp_path / "a")


def test_too_little_disk_is_said_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs about"):
        files.require_space(tmp_path / "not" / "there", 10**18, "the test")
    files.require_space(tmp_path, 1, "the test")


def test_digest_does_not_depend_on_key_order() -> None:
    assert files.digest({"a": 1, "b": [2]}) == files.digest({"b": [2], "a": 1}) != files.digest({"a": 1, "b": [3]})


def test_a_name_too_long_is_explained(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught:
        (tmp_path / ("x" * 300)).write_text("")
    explained = from_system_error(caught.value)
    assert isinstance(explained, InputError) and "too long" in str(explained)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to …"
        ),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 5 bytes."),
        MemoryError(),
    ],
)
def test_no_memory_is_explained(error: Exception) -> None:
    explained = from_system_error(error)
    assert isinstance(explained, InputError) and explained.exit_code == 2
    for part in ("not enough memory", "train.batch_size", "data.max_length"):
        assert part in str(explained)
    assert from_system_error(RuntimeError("shape mismatch")) is None


def test_torch_words_it_so() -> None:
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert from_system_error(caught.value) is not None


def test_missing_packages_are_named_with_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    require_extra("train")
    require_extra("export")
    for name in ("peft", "onnx_ir", "onnx"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"^onnx, onnx_ir are not installed(.|\n)*pip install 'edgetune\[export\]'"):
        require_extra("export")
    with pytest.raises(InputError, match=r"^peft is not installed(.|\n)*pip install 'edgetune\[train\]'"):
        require_extra("train")
    with pytest.raises(InputError, match=r"^onnx is not(.|\n)*\[export\]"):
        need("torch", "onnx", extra="export")


def test_extras_are_those_of_the_project() -> None:
    stated = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    for extra, packages in EXTRAS.items():
        lines = list(stated["optional-dependencies"][extra])
        if "edgetune[export]" in lines:
            lines += stated["optional-dependencies"]["export"]
        named = {line.partition(">=")[0].replace("-", "_") for line in lines} - {"edgetune[export]"}
        assert set(packages) == named - (set() if extra == "train" else {"gguf"})  # only to read a GGUF base
        assert all(importlib.util.find_spec(package) for package in packages)


def test_small_room_is_told_in_numbers_that_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=200_000))
    with pytest.raises(InputError, match=r"needs about 0.345 MB of disk, 0.200 MB are free") as caught:
        files.require_space(tmp_path / "new", 345_000, "the export")
    assert caught.value.where == str(tmp_path / "new")
