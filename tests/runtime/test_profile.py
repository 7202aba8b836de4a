"""Device profiles: read, written, used where they count, and left aside, with a word on it, where they do not."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from artifacts import copy_of, seal, tiny_artifact  # noqa: F401
from edgetune.errors import InputError
from edgetune.runtime import load
from edgetune.runtime import profile as module
from edgetune.runtime.artifact import Artifact, open_artifact
from edgetune.runtime.hardware import cpu, default_threads
from edgetune.runtime.options import GenerationOptions
from edgetune.runtime.profile import Profile, Settings, find, profile_path, read, save, settings_for

TUNED = Settings(1, {"session.intra_op.allow_spinning": "0"}, 32, {1: 1.0, 2: 1.3})


@pytest.fixture
def artifact(tiny_artifact: Path) -> Artifact:  # noqa: F811
    return open_artifact(tiny_artifact)


def profile_of(artifact: Artifact, settings: Settings = TUNED) -> Profile:
    return Profile(module.artifact_digest(artifact), artifact.name, cpu(), module.engine(), settings, {})


def test_a_profile_is_read_as_it_was_written(artifact: Artifact):
    made = profile_of(artifact)
    save(made, profile_path(artifact))
    assert read(profile_path(artifact)) == made
    assert find(artifact) == (made, None)


def test_a_session_uses_it_unless_told_otherwise(artifact: Artifact, tiny_artifact: Path):  # noqa: F811
    save(profile_of(artifact), profile_path(artifact))
    plain = load(tiny_artifact, use_profile=False)
    tuned = load(tiny_artifact)
    assert tuned.settings == TUNED and plain.settings == Settings()
    assert load(tiny_artifact, threads=1).settings == Settings(1)
    options = GenerationOptions(max_tokens=12)
    assert tuned.generate("one two three", options).ids == plain.generate("one two three", options).ids


def test_settings_become_session_options():
    assert TUNED.overlay()["intra_op_num_threads"] == 1
    assert TUNED.overlay()["session.intra_op.allow_spinning"] == "0"
    assert Settings().overlay()["intra_op_num_threads"] == default_threads()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"engine": {"onnxruntime": "0.1", "onnxruntime-genai": "0.1"}}, "onnxruntime 0.1"),
        ({"processor": {**cpu(), "model": "Another One", "usable_cores": 64}}, "64 cores of Another One"),
    ],
)
def test_one_of_another_machine_or_version_is_ignored_and_said(artifact: Artifact, capsys, changes, word):
    path = profile_path(artifact)
    save(replace(profile_of(artifact), **changes), path.with_name(path.stem[:16] + "-00000000.json"))
    assert settings_for(artifact) == Settings()
    said = capsys.readouterr().err
    assert word in said and "not used" in said and "edgetune tune" in said


def test_one_of_another_artifact_is_not_found(artifact: Artifact, tmp_path: Path, capsys):
    save(profile_of(artifact), profile_path(artifact))
    other = copy_of(artifact.path, tmp_path)
    config = other / "genai_config.json"
    config.write_text(config.read_text() + "\n")
    seal(other)
    assert find(open_artifact(other)) == (None, None)


def test_a_new_card_keeps_the_profile(artifact: Artifact, tmp_path: Path):
    other = copy_of(artifact.path, tmp_path)
    (other / "README.md").write_text("# measured\n")
    seal(other)
    assert profile_path(open_artifact(other)) == profile_path(artifact)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "else"},
        {"settings": {}},
        {"settings": {**asdict(TUNED), "threads": 0}},
        {"settings": {**asdict(TUNED), "session": {"custom_ops_library": "./evil.so"}}},
        {"settings": {**asdict(TUNED), "session": [], "prefill_tokens": True}},
        {"settings": {**asdict(TUNED), "row_costs": {"two": 1.0}}},
        {"settings": {**asdict(TUNED), "row_costs": [1.0]}},
        {"settings": {**asdict(TUNED), "row_costs": {"1": 1.0, "2": -1.0}}},
    ],
)
def test_a_broken_one_is_refused_and_never_used(artifact: Artifact, change, capsys):
    path = profile_path(artifact)
    save(profile_of(artifact), path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError):
        read(path)
    assert settings_for(artifact) == Settings()
    assert "not used" in capsys.readouterr().err


def test_text_that_is_no_json_is_refused(artifact: Artifact, capsys):
    path = profile_path(artifact)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\xff{")
    assert settings_for(artifact) == Settings()
    assert "not used" in capsys.readouterr().err
