"""Merging: the same logits, the tie, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from conftest import edgetune
from edgetune.errors import EdgetuneError, InputError
from edgetune.models import load_model, load_tokenizer, resolve, stop_ids
from edgetune.recipe import MergeSection, ModelSection
from edgetune.run import Work, seal
from edgetune.standalone import merge_adapter
from edgetune.train.merge import merge


def adapter_of(model: Path, folder: Path, scale: float = 0.2) -> Path:
    """A random adapter; `scale` 0 is one that changes nothing."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    adapted = get_peft_model(
        load_model(model, dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, scale) if scale else weight.data.zero_()
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> Path:
    return adapter_of(tiny_model, tmp_path / "adapter")


def merged(model: Path, adapter: Path, folder: Path) -> tuple[dict[str, Any], Path]:
    for name in ("report", "merged"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    base = resolve(ModelSection(id=str(model)))
    rows = [[5, 6, 7, 8], [9, 10, 11]]
    outputs = {"report": folder / "report", "merged": folder / "merged"}
    return merge(MergeSection(), base, adapter, rows, trust_remote_code=False, **outputs), folder / "merged"


def test_merged_gives_the_logits_of_base_plus_adapter(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel

    report, folder = merged(tiny_model, adapter, tmp_path)
    assert 0 <= report["max_logprob_difference"] < 1e-4 and report["largest_update"] > 0.01
    assert report["tied_embeddings"] and report["warnings"] == []
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    base = load_model(tiny_model, dtype=torch.float32)
    before = base(input_ids=ids).logits
    wanted = PeftModel.from_pretrained(base, str(adapter))(input_ids=ids).logits
    found = load_model(folder, dtype=torch.float32)(input_ids=ids).logits
    assert torch.allclose(found, wanted, atol=1e-4) and not torch.allclose(found, before, atol=1e-2)
    assert load_tokenizer(folder).chat_template == load_tokenizer(tiny_model).chat_template
    assert stop_ids(folder) == stop_ids(tiny_model)
    assert str(tmp_path) not in (folder / "config.json").read_text() + (folder / "tokenizer_config.json").read_text()


def test_the_end_of_turn_token_becomes_a_stop_token(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    seal(adapter, Work("train", {}, {}), stop_id=7)
    assert stop_ids(merged(tiny_model, adapter, tmp_path)[1]) == [2, 7]


def test_an_adapter_that_changes_nothing_is_reported(tiny_model: Path, tmp_path: Path) -> None:
    report, _ = merged(tiny_model, adapter_of(tiny_model, tmp_path / "zero", 0.0), tmp_path)
    assert report["largest_update"] == 0 and "changes nothing" in report["warnings"][0]


def test_a_wrong_merge_is_caught(
    tiny_model: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel

    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self: self.unload(), raising=False)  # forgets the adapter
    with pytest.raises(EdgetuneError, match="differs from base"):
        merged(tiny_model, adapter, tmp_path)


@pytest.mark.parametrize("damage", ["config", "weights", "pickle", "json", "truncated", "other base"])
def test_damaged_adapters(tiny_model: Path, adapter: Path, tmp_path: Path, damage: str) -> None:
    weights = adapter / "adapter_model.safetensors"
    if damage == "config":
        (adapter / "adapter_config.json").unlink()
    elif damage == "weights":
        weights.unlink()
    elif damage == "pickle":
        weights.rename(adapter / "adapter_model.bin")
    elif damage == "json":
        (adapter / "adapter_config.json").write_text("{")
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "r": 8}))
    failed = edgetune("merge", adapter, "--base", tiny_model, "--out", tmp_path / "out")
    assert failed.returncode == 2, failed.stderr
    assert "Traceback" not in failed.stderr and not (tmp_path / "out").exists()


def test_alone_on_a_folder_and_never_over_its_input(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    found = merge_adapter(adapter, tmp_path / "out", ModelSection(id=str(tiny_model)))
    assert found["max_logprob_difference"] < 1e-4 and (tmp_path / "out/manifest.json").is_file()
    merge_adapter(adapter, tmp_path / "out", ModelSection(id=str(tiny_model)))  # its own output is replaced
    with pytest.raises(InputError, match="overwrite the input"):
        merge_adapter(adapter, adapter, ModelSection(id=str(tiny_model)))
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/thesis.txt").write_text("x")
    (tmp_path / "precious/manifest.json").write_text('{"name": "a browser extension"}')
    with pytest.raises(InputError, match="no earlier output"):
        merge_adapter(adapter, tmp_path / "precious", ModelSection(id=str(tiny_model)))
    assert (tmp_path / "precious/thesis.txt").read_text() == "x"


def test_another_base_than_trained_on_is_refused(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    seal(adapter, Work("train", {"base": {"id": "x", "sha256": "0" * 64}}, {}))
    with pytest.raises(InputError, match="not the base"):
        merge_adapter(adapter, tmp_path / "out", ModelSection(id=str(tiny_model)))


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not an adapter"):
        merge_adapter(tmp_path / "none", tmp_path / "out")
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
