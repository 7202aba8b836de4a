"""GGUF: the conversion gives the same model, is done once, and never half."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tiny_gguf import write_gguf

from edgetune.errors import InputError
from edgetune.models import load_model, load_tokenizer, local, resolve, store
from edgetune.recipe import ModelSection


@pytest.fixture(scope="module")
def gguf_file(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tiny_model, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def _resolve(file: Path):
    return resolve(ModelSection(id=str(file)))


def test_conversion_is_the_same_model(gguf_file: Path, tiny_model: Path) -> None:
    import torch

    base = _resolve(gguf_file)
    assert (base.source, base.id, base.license) == ("gguf", str(gguf_file), "mit")
    converted = load_model(base.path, dtype=torch.float32)
    original = load_model(tiny_model, dtype=torch.float32)
    ids = torch.tensor([[5, 77, 200, 301, 9]])
    with torch.no_grad():
        assert torch.equal(converted(ids).logits, original(ids).logits)
    text = "naïve café 東京 add(a, b)"
    assert load_tokenizer(base.path)(text).input_ids == load_tokenizer(tiny_model)(text).input_ids


def test_folder_is_clean_and_complete(gguf_file: Path) -> None:
    base = _resolve(gguf_file)
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= base.files.keys()
    tokenizer = json.loads((base.path / "tokenizer_config.json").read_text())
    assert not {"is_local", "local_files_only"} & tokenizer.keys()
    everything = "".join((base.path / name).read_text() for name in base.files if name.endswith("config.json"))
    assert "someone" not in everything
    assert str(gguf_file.parent) not in everything
    config = json.loads((base.path / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert "quantization_config" not in config
    manifest = json.loads((base.path / "manifest.json").read_text())
    assert manifest["format"] == "edgetune/model/1"
    assert manifest["files"] == base.files
    modes = {(base.path / name).stat().st_mode for name in base.files}
    assert len(modes) == 1


def test_converted_once(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert local(ModelSection(id=str(gguf_file))) is None
    first = _resolve(gguf_file)
    monkeypatch.setattr("edgetune.models.gguf.convert", lambda *_: pytest.fail("converted again"))
    assert _resolve(gguf_file) == first == local(ModelSection(id=str(gguf_file)))


def test_same_file_elsewhere_is_not_converted_again(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _resolve(gguf_file)
    copy = tmp_path / "tiny.gguf"
    shutil.copy(gguf_file, copy)
    monkeypatch.setattr("edgetune.models.gguf.convert", lambda *_: pytest.fail("converted again"))
    second = _resolve(copy)
    assert second.path == first.path
    assert second.id == str(copy)


def test_damaged_conversion_is_made_anew(gguf_file: Path) -> None:
    base = _resolve(gguf_file)
    weights = base.path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(1, 1))
    assert store.lookup(base.path) is None
    assert _resolve(gguf_file).files == base.files
    assert store.lookup(base.path) is not None


KILLED = """
import sys, time
from pathlib import Path
import transformers
save = transformers.PreTrainedModel.save_pretrained
def stuck(self, folder, *a, **k):
    save(self, folder, *a, **k)
    print("saved", folder, flush=True)
    time.sleep(600)
transformers.PreTrainedModel.save_pretrained = stuck
from edgetune.models import resolve
from edgetune.recipe import ModelSection
resolve(ModelSection(id=sys.argv[1]))
"""


def test_killed_conversion_is_not_taken_for_done(gguf_file: Path, own_home: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(gguf_file)], stdout=subprocess.PIPE, text=True)
    try:
        said = child.stdout.readline()
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    half = Path(said.split()[1])
    assert said.startswith("saved")
    assert (half / "model.safetensors").is_file(), "the weights were written when it was killed"
    assert [p.name.startswith(".tmp-") for p in (own_home / "models").iterdir()] == [True]
    assert store.kept_models() == []
    base = _resolve(gguf_file)
    assert store.lookup(base.path) == base
    assert [p.name for p in (own_home / "models").iterdir()] == [base.path.name], "the leftover is gone"


def test_two_at_once_convert_once(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgetune.models import gguf

    real, calls, results = gguf.convert, [], []

    def counted(*args):
        calls.append(1)
        return real(*args)

    monkeypatch.setattr("edgetune.models.gguf.convert", counted)
    threads = [threading.Thread(target=lambda: results.append(_resolve(gguf_file))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert results[0] == results[1]


def test_truncated_at_any_byte(gguf_file: Path, tmp_path: Path) -> None:
    content = gguf_file.read_bytes()
    sizes = [0, 3, 4, 8, 20, 24, len(content) // 2, len(content) - 40]
    sizes += random.Random(1).sample(range(len(content) - 64), 12)
    for size in sizes:
        broken = tmp_path / f"cut-{size}.gguf"
        broken.write_bytes(content[:size])
        for ask in (resolve, local):
            with pytest.raises(InputError, match=r"truncated or broken|no GGUF file"):
                ask(ModelSection(id=str(broken)))
    assert store.kept_models() == []


def test_bad_files(gguf_file: Path, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        _resolve(tmp_path / "absent.gguf")
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\3\4" + b"\0" * 100)
    with pytest.raises(InputError, match="is no GGUF file"):
        _resolve(other)
    folder = tmp_path / "folder.gguf"
    folder.mkdir()
    with pytest.raises(InputError, match="is no file"):
        _resolve(folder)
    part = tmp_path / "big-00001-of-00003.gguf"
    shutil.copy(gguf_file, part)
    with pytest.raises(InputError, match="split GGUF"):
        _resolve(part)


def test_unknown_architecture_and_missing_weight(tiny_model: Path, tmp_path: Path, own_home: Path) -> None:
    strange = write_gguf(tiny_model, tmp_path / "strange.gguf", architecture="rwkv6")
    with pytest.raises(InputError, match="cannot convert this GGUF"):
        _resolve(strange)
    lacking = write_gguf(tiny_model, tmp_path / "lacking.gguf", leave_out="layers.1.mlp.up_proj")
    with pytest.raises(InputError, match="lacks weights"):
        _resolve(lacking)
    assert list((own_home / "models").iterdir()) == [], "nothing half-written"


def test_no_gguf_package(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"gguf is not installed(.|\n)*edgetune\[train\]"):
        _resolve(gguf_file)
