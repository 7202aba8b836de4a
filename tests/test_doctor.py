"""doctor: on this machine, and with packages that are missing, wrong or broken."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path

import pytest

from conftest import edgetune
from edgetune import doctor

REAL = metadata.version


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch):
    """Pretend other versions; None takes a package away."""

    def pretend(**versions: str | None) -> None:
        wanted = {name.replace("_", "-"): version for name, version in versions.items()}

        def version(name: str) -> str | None:
            if name in wanted:
                return wanted[name]
            try:
                return REAL(name)
            except metadata.PackageNotFoundError:
                return None

        requires = metadata.requires
        monkeypatch.setattr(doctor, "_version", version)
        monkeypatch.setattr(doctor.metadata, "requires", lambda name: requires(name) if _is_installed(name) else [])

    return pretend


def _is_installed(name: str) -> bool:
    try:
        return bool(REAL(name))
    except metadata.PackageNotFoundError:
        return False


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch):
    """Leave out what takes time and is not looked at."""
    monkeypatch.setattr(doctor, "bandwidth_gb_s", lambda: 12.34)
    monkeypatch.setattr(doctor.providers, "examine", lambda: [])
    works = {"works": True, "providers": ["CPUExecutionProvider"], "telemetry_off": True}
    monkeypatch.setattr(doctor, "_runtime", lambda: (works, []))


def test_this_machine_works():
    done = edgetune("doctor", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["ok"] and not found["broken"], found["broken"]
    assert found["runtime"]["works"] and found["runtime"]["telemetry_off"]
    assert "CPUExecutionProvider" in found["runtime"]["providers"]
    assert found["extras"]["runtime"] and found["hardware"]["cpu"]["model"]
    assert found["bandwidth_gb_s"] > 0 and all(free > 0 for free in found["disk_free_mb"].values())
    assert {"torch", "onnxruntime"} <= {need["name"] for need in found["packages"]}
    assert not Path(found["home"]["path"]).exists()  # it looks, and makes nothing


def test_table_names_every_package_once_and_the_machine():
    done = edgetune("doctor")
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout
    for name in ("edgetune", "onnxruntime", "onnxruntime-genai", "torch", "transformers", "pytest"):
        assert sum(line.split()[:1] == [name] for line in lines) >= 1, name
    for what in ("CPU", "instruction sets", "memory bandwidth", "execution providers", "telemetry"):
        assert any(line.startswith(what) for line in lines), what
    assert lines[-1] == "the runtime works"


@pytest.mark.usefixtures("quick")
def test_a_missing_package_is_one_line_with_its_cure(installed):
    installed(peft=None, torch=None, openai=None)
    found = doctor.examine()
    assert found["ok"]  # what is not installed is not broken
    assert found["extras"] == {"runtime": True, "train": False, "export": False, "dev": False}
    assert set(found["missing"]) == {
        "peft is missing, for train: pip install 'edgetune[train]'",
        "torch is missing, for train and export: pip install 'edgetune[train]'",
        "openai is missing, for dev: pip install 'edgetune[dev]'",
    }
    assert ("peft", "missing", "<0.22,>=0.19", "train") in doctor.packages_table(found)


@pytest.mark.usefixtures("quick")
def test_a_missing_package_of_the_runtime(installed):
    installed(uvicorn=None)
    found = doctor.examine()
    assert found["missing"] == ["uvicorn is missing, for runtime: pip install edgetune"]
    assert not found["extras"]["runtime"] and not found["ok"]


@pytest.mark.usefixtures("quick")
def test_a_version_out_of_range_is_named(installed):
    installed(transformers="4.57.1", torch="2.14.0+cpu")
    found = doctor.examine()
    text = "\n".join(found["broken"])
    assert not found["ok"] and not found["extras"]["train"] and not found["extras"]["export"]
    assert "torch 2.14.0+cpu is outside <2.14,>=2.11: pip install 'edgetune[train]'" in text
    assert "onnxruntime-genai 0.18.0 with transformers 4.57.1: its model builder" in text
    assert any(row[:2] == ("torch", "2.14.0+cpu (!)") for row in doctor.packages_table(found))


@pytest.mark.usefixtures("quick")
def test_a_gpu_s_build_of_the_runtime_is_the_runtime(installed):
    installed(onnxruntime=None, onnxruntime_gpu="1.31.1", onnxruntime_genai=None, onnxruntime_genai_cuda="0.18.0")
    found = doctor.examine()
    assert found["missing"] == [] and found["broken"] == []
    assert ("onnxruntime", "1.31.1") in [row[:2] for row in doctor.packages_table(found)]
    installed(onnxruntime=None, onnxruntime_gpu="1.20.0", onnxruntime_genai=None, onnxruntime_genai_cuda="0.18.0")
    assert any("onnxruntime 1.20.0 is outside" in line for line in doctor.examine()["broken"])


@pytest.mark.usefixtures("quick")
def test_known_bad_pairs(installed):
    installed(optimum_onnx="0.1.0", onnxruntime_gpu="1.31.0")
    text = "\n".join(doctor.examine()["broken"])
    assert f"optimum-onnx 0.1.0 with transformers {REAL('transformers')}" in text
    assert "pip uninstall optimum-onnx" in text
    assert "onnxruntime and onnxruntime-gpu overwrite each other's files" in text


@pytest.mark.usefixtures("quick")
def test_what_packages_ask_of_each_other(installed):
    installed(tokenizers="0.1.0", flatbuffers=None)
    text = "\n".join(doctor.examine()["broken"])
    assert f"transformers {REAL('transformers')} needs tokenizers" in text and "installed is 0.1.0" in text
    assert "needs flatbuffers, which is missing: pip install 'flatbuffers'" in text


def test_exit_code_and_message_with_another_transformers(tmp_path):
    """A package's metadata in front of the real one, as an older installation would leave it."""
    info = tmp_path / "transformers-4.57.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.57.1\n")
    done = edgetune("doctor", env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    assert "broken: transformers 4.57.1 is outside <6,>=5.2: pip install 'edgetune[train]'" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_a_runtime_that_does_not_load(tmp_path):
    (tmp_path / "onnxruntime_genai.py").write_text("raise ImportError('libfoo.so.3: cannot open')")
    done = edgetune("doctor", "--json", env={"PYTHONPATH": str(tmp_path)})
    found = json.loads(done.stdout)
    assert done.returncode == 1 and not found["runtime"]["works"]
    assert "libfoo.so.3: cannot open" in found["broken"][0] and "pip install" in found["broken"][0]


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_runtime_that_crashes(tmp_path):
    (tmp_path / "onnxruntime_genai.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)")
    done = edgetune("doctor", env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    assert "SIGILL, as it needs instructions that this processor lacks" in done.stdout


def test_torch_is_neither_imported_nor_needed(tmp_path):
    for name in ("torch", "transformers", "peft"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(f'{__name__} was imported')")
    done = edgetune("doctor", env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.usefixtures("quick")
def test_torch_for_cuda_without_a_driver(tmp_path, monkeypatch):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise SystemExit('torch was imported')")
    (tmp_path / "torch" / "version.py").write_text("from typing import Optional\ncuda: Optional[str] = '13.0'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor, "_nvidia_driver", lambda: False)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert any("built for CUDA 13.0" in note for note in doctor.examine()["notes"])
    monkeypatch.setattr(doctor, "_nvidia_driver", lambda: True)
    assert not any("CUDA" in note for note in doctor.examine()["notes"])


@pytest.mark.usefixtures("quick")
def test_home_that_cannot_be_written_and_no_pip(monkeypatch):
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    find = doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda n: None if n == "pip" else find(n))
    found = doctor.examine()
    assert not found["home"]["writable"] and not found["pip"]
    notes = "\n".join(found["notes"])
    assert "EDGETUNE_HOME" in notes and "python -m ensurepip" in notes


def test_without_numpy_the_rest_is_told(monkeypatch):
    def missing() -> float:
        raise ModuleNotFoundError("No module named 'numpy'")

    monkeypatch.setattr(doctor, "bandwidth_gb_s", missing)
    monkeypatch.setattr(doctor, "_runtime", lambda: ({"works": False, "providers": [], "telemetry_off": False}, ["x"]))
    found = doctor.examine()
    assert found["bandwidth_gb_s"] is None and found["hardware"]
    assert ("memory bandwidth", "not measured") in doctor.machine_table(found)
