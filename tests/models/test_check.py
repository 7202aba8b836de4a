"""Bad model folders: each is refused with the file and the cure."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from edgetune.errors import InputError
from edgetune.models import check_folder, local, resolve
from edgetune.models.base import stated_license
from edgetune.recipe import ModelSection


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def _edit(path: Path, **values: object) -> None:
    content = json.loads(path.read_text())
    content.update(values)
    path.write_text(json.dumps(content))


def test_good_folder(model: Path) -> None:
    base = resolve(ModelSection(id=str(model)))
    assert (base.path, base.source, base.id, base.revision) == (model, "folder", str(model), None)
    assert "model.safetensors" in base.files
    (model / "README.md").write_text("---\nlicense: other\nlicense_name: my-terms\n---\n# hello\n")
    again = resolve(ModelSection(id=str(model)))
    assert again.license == "my-terms"
    assert again.digest == base.digest, "a model card changes nothing"
    _edit(model / "generation_config.json", eos_token_id=[2, 0])
    assert resolve(ModelSection(id=str(model))).digest != base.digest


def _pickle_only(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def _adapter(model: Path) -> None:
    (model / "adapter_config.json").write_text("{}")


def _artifact(model: Path) -> None:
    (model / "genai_config.json").write_text("{}")


def _quantized(model: Path) -> None:
    _edit(model / "config.json", quantization_config={"quant_method": "bitsandbytes"})


def _no_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def _link_out(model: Path) -> None:
    outside = model.parent / "outside.safetensors"
    (model / "model.safetensors").rename(outside)
    (model / "model.safetensors").symlink_to(outside)


def _index_out(model: Path) -> None:
    (model / "model.safetensors").rename(model.parent / "x.safetensors")
    index = {"weight_map": {"a": "../x.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def _shard_missing(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def _other_name(model: Path) -> None:
    (model / "model.safetensors").rename(model / "consolidated.safetensors")


def _code(model: Path) -> None:
    _edit(model / "config.json", model_type="mine", auto_map={"AutoModelForCausalLM": "mine.Mine"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: (m / "config.json").unlink(), "no config.json"),
        (lambda m: (m / "config.json").write_text("{"), "config.json: not a JSON file"),
        (lambda m: (m / "config.json").write_text("[]"), "config.json: holds no JSON object"),
        (lambda m: (m / "generation_config.json").write_text("[]"), "generation_config.json: holds no JSON object"),
        (lambda m: _edit(m / "config.json", model_type=7), "names no `model_type`"),
        (lambda m: (m / "tokenizer.json").write_text('{"a":'), "tokenizer.json: not a JSON file"),
        (lambda m: (m / "model.safetensors").unlink(), "no weights"),
        (_pickle_only, r"only pickle weights \(pytorch_model.bin\)(.|\n)*save_pretrained"),
        (_adapter, r"is an adapter(.|\n)*edgetune merge"),
        (_artifact, "exported artifact"),
        (_quantized, r"already quantized \(bitsandbytes\)"),
        (_no_tokenizer, "no tokenizer"),
        (_link_out, "leads out of the folder"),
        (_index_out, "no safetensors file of this folder"),
        (_shard_missing, "model-00002-of-00002.safetensors is missing"),
        (_other_name, "transformers loads model.safetensors"),
        (_code, "trust_remote_code"),
    ],
)
def test_refused(model: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(model)
    with pytest.raises(InputError, match=message):
        resolve(ModelSection(id=str(model)))
    with pytest.raises(InputError, match=message):
        local(ModelSection(id=str(model)))


def test_code_is_accepted_where_trusted_or_not_needed(model: Path) -> None:
    _code(model)
    check_folder(model, trust_remote_code=True)
    _edit(model / "config.json", model_type="llama")  # as Phi-3's folder: code that transformers no longer needs
    check_folder(model)


def test_truncated_at_any_byte(model: Path) -> None:
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    header = struct.unpack("<Q", content[:8])[0]
    for size in (0, 4, 8, 20, 8 + header - 1, 8 + header, len(content) - 1):
        weights.write_bytes(content[:size])
        with pytest.raises(InputError, match=r"model.safetensors: is (truncated|no safetensors)"):
            check_folder(model)
    weights.write_bytes(content + b"\0")
    with pytest.raises(InputError, match="its header says"):
        check_folder(model)
    weights.write_bytes(b"\x10" + b"\0" * 7 + b"not json at all!")
    with pytest.raises(InputError, match="header is broken"):
        check_folder(model)


def test_hub_snapshot_consists_of_links(model: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in model.iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    check_folder(snapshot)


def test_not_a_folder(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        resolve(ModelSection(id=str(tmp_path / "absent")))
    with pytest.raises(InputError, match=f"is a file(.|\n)*{model}"):
        resolve(ModelSection(id=str(model / "model.safetensors")))
    with pytest.raises(InputError, match=f"did you mean {model}"):
        resolve(ModelSection(id=str(tmp_path)))
    run = tmp_path / "run"
    shutil.copytree(model, run / "merged")
    (run / "recipe.json").write_text("{}")
    with pytest.raises(InputError, match=f"is a run(.|\n)*{run / 'merged'}"):
        resolve(ModelSection(id=str(run)))
    with pytest.raises(InputError, match="revision"):
        resolve(ModelSection(id=str(model), revision="main"))


def test_what_resolve_refuses_is_not_on_this_machine_either(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for wrong in (
        ModelSection(id="./absent"),
        ModelSection(id=str(tmp_path / "absent")),
        ModelSection(id="a/b/c"),
        ModelSection(id="absent.gguf"),
        ModelSection(id="package:absent"),
        ModelSection(id=str(model), revision="main"),
    ):
        said = []
        for ask in (resolve, local):
            with pytest.raises(InputError) as caught:
                ask(wrong)
            said.append(str(caught.value))
        assert said[0] == said[1]
    assert local(ModelSection(id=f" {os.path.relpath(model)} ")) == resolve(ModelSection(id=str(model)))


def test_license_of_broken_card(tmp_path: Path) -> None:
    assert stated_license(tmp_path) is None
    for text in ("no front matter", "---\n: : [\n---\n", "---\nlicense: [mit, apache-2.0]\n---\n"):
        (tmp_path / "README.md").write_text(text)
    assert stated_license(tmp_path) == "mit, apache-2.0"
    (tmp_path / "README.md").write_text("---\n: : [\n---\n")
    assert stated_license(tmp_path) is None
