"""Artifacts are verified before anything of them is loaded."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from artifacts import MAX_LENGTH, copy_of, edit_json, seal, tiny_artifact  # noqa: F401
from edgetune.errors import InputError
from edgetune.runtime import artifact as module
from edgetune.runtime.artifact import open_artifact


@pytest.fixture
def copy(tiny_artifact: Path, tmp_path: Path) -> Path:  # noqa: F811
    return copy_of(tiny_artifact, tmp_path)


def refused(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_artifact(path)
    assert caught.value.exit_code == 2
    return caught.value.text()


def test_whole_artifact(copy: Path) -> None:
    found = open_artifact(copy)
    assert found.max_length == MAX_LENGTH
    assert found.stop_ids == (2,)
    assert found.name == "tiny"
    listed = [path for path in copy.iterdir() if path.name != "manifest.json"]
    assert found.size_mb == pytest.approx(sum(path.stat().st_size for path in listed) / 1e6)


def test_stop_ids_may_be_several(copy: Path) -> None:
    config = json.loads((copy / "genai_config.json").read_text())
    config["model"]["eos_token_id"] = [2, 0]
    (copy / "genai_config.json").write_text(json.dumps(config))
    seal(copy)
    assert open_artifact(copy).stop_ids == (2, 0)


def test_run_folder_stands_for_its_artifact(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    shutil.move(copy, tmp_path / "run" / "artifact")
    assert open_artifact(tmp_path / "run").path == (tmp_path / "run" / "artifact").resolve()
    (tmp_path / "link").symlink_to(tmp_path / "run" / "artifact")
    assert open_artifact(tmp_path / "link").name == "tiny"  # the folder itself may be reached by a link


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "tokenizer.json", "README.md", "golden.json"])
def test_one_byte_changed(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    message = refused(copy)
    assert f"{name}: is not the file that was exported" in message
    assert "copy the artifact again" in message


def test_truncated(copy: Path) -> None:
    os.truncate(copy / "model.onnx.data", 1000)
    assert "model.onnx.data: has 1,000 bytes; the manifest says" in refused(copy)


@pytest.mark.parametrize(
    "name", ["model.onnx.data", "chat_template.jinja", "tokenizer_config.json", "genai_config.json"]
)
def test_missing_file(copy: Path, name: str) -> None:
    (copy / name).unlink()
    assert f"{name}: is missing; the manifest lists it" in refused(copy)


def test_link_out_of_the_folder(copy: Path, tmp_path: Path) -> None:
    shutil.move(copy / "model.onnx.data", tmp_path / "weights")
    (copy / "model.onnx.data").symlink_to(tmp_path / "weights")  # the right bytes, in the wrong place
    assert "model.onnx.data: is a link that leads out of the artifact" in refused(copy)
    (tmp_path / "weights").unlink()
    assert "is a link that leads nowhere" in refused(copy)


def test_link_inside_the_folder(copy: Path) -> None:
    (copy / "weights").mkdir()
    shutil.move(copy / "model.onnx.data", copy / "weights" / "data")
    (copy / "model.onnx.data").symlink_to("weights/data")
    assert open_artifact(copy).max_length == MAX_LENGTH


def test_linked_folder_leads_out(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "notes.txt").write_text("x")
    (copy / "extra").symlink_to(tmp_path / "elsewhere")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["outputs"]["extra/notes.txt"] = {"sha256": "0" * 64, "bytes": 1}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert "notes.txt: is a link that leads out of the artifact" in refused(copy)


def test_fifo_is_no_file(copy: Path) -> None:
    (copy / "README.md").unlink()
    os.mkfifo(copy / "README.md")  # reading it would wait for ever
    assert "README.md: is not a regular file" in refused(copy)


@pytest.mark.parametrize("name", ["../secret", "a/../../b", "/etc/passwd", "C:\\x", "c:x", "..\\x", "", "a\0b"])
def test_names_that_lead_outside(copy: Path, name: str) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["outputs"][name] = {"sha256": "0" * 64, "bytes": 1}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert "names a file outside the artifact" in refused(copy)


@pytest.mark.parametrize(
    "name", ["adapter.onnx", "other.data", "tokenizer.model", "special_tokens_map.json", "sub/x.onnx"]
)
def test_stranger_that_the_runtime_would_read(copy: Path, name: str) -> None:
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text("x")
    assert "is not in the manifest, but ONNX Runtime would read it" in refused(copy)


def test_other_strangers_are_left_alone(copy: Path) -> None:
    for name in (".DS_Store", "notes.txt", "report.json"):
        (copy / name).write_text("x")
    assert open_artifact(copy).name == "tiny"


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("filename", "../model.onnx", "names a file outside"),
        ("filename", "/tmp/model.onnx", "names a file outside"),
        ("filename", "other.onnx", "a file that the manifest does not list"),
        ("custom_ops_library", "evil.so", "a file that the manifest does not list"),
    ],
)
def test_config_names_files(copy: Path, key: str, value: str, what: str) -> None:
    config = json.loads((copy / "genai_config.json").read_text())
    config["model"]["decoder"][key] = value
    (copy / "genai_config.json").write_text(json.dumps(config))
    seal(copy)
    assert what in refused(copy)


@pytest.mark.parametrize("key", ["search", "model"])
def test_config_without_what_is_needed(copy: Path, key: str) -> None:
    edit_json(copy / "genai_config.json", **{key: {}})
    seal(copy)
    assert "genai_config.json: lacks" in refused(copy)


def test_golden_of_another_format(copy: Path) -> None:
    edit_json(copy / "golden.json", format="edgetune/golden/9")
    seal(copy)
    assert "golden.json: is not of the format" in refused(copy)
    edit_json(copy / "golden.json", format="edgetune/golden/1", prompts=[])
    seal(copy)
    assert "golden.json: has no golden prompts" in refused(copy)


def test_no_manifest(copy: Path, tmp_path: Path) -> None:
    (copy / "manifest.json").unlink()
    assert "is not an edgetune artifact: without manifest.json there is nothing to check" in refused(copy)
    (tmp_path / "run" / "merged").mkdir(parents=True)
    assert "this run has no artifact yet" in refused(tmp_path / "run")
    assert "is not an artifact" in refused(tmp_path)
    assert "no such folder" in refused(tmp_path / "nothing")
    assert "is a file; an artifact is a folder" in refused(copy / "README.md")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "not a JSON file"),
        ("[]", "the manifest's format is None"),
        ('{"format": "edgetune/manifest/7"}', "the manifest's format is 'edgetune/manifest/7'"),
        ('{"format": "edgetune/manifest/1"}', "does not list its files"),
        ('{"format": "edgetune/manifest/1", "outputs": {"a": "b"}}', "does not list its files"),
        ('{"format": "edgetune/manifest/1", "outputs": {}}', "does not list genai_config.json"),
        ('{"format": "edgetune/manifest/1", "stage": "merge", "outputs": {}}', "is what the stage merge made"),
    ],
)
def test_broken_manifest(copy: Path, text: str, what: str) -> None:
    (copy / "manifest.json").write_text(text)
    assert what in refused(copy)


def test_big_artifacts_show_progress(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    open_artifact(copy)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(module, "_BAR_FROM_BYTES", 1000)
    open_artifact(copy)
    assert "checking the artifact" in capsys.readouterr().err
