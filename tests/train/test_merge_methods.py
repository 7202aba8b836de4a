"""Merging what each method leaves: qlora's two bases, and whole models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import edgetune, write_jsonl
from edgetune.data.render import Encoded
from edgetune.errors import EdgetuneError, InputError
from edgetune.models import Base, load_model, load_tokenizer, resolve, stop_ids
from edgetune.recipe import MergeSection, ModelSection, TrainSection
from edgetune.run import Work, seal
from edgetune.standalone import merge_adapter
from edgetune.train import method, quantize
from edgetune.train.merge import merge

ROWS = [Encoded([3 + (n * 31 + k * k) % 370 for k in range(20)], [k > 3 for k in range(20)]) for n in range(4)]


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> Base:
    return resolve(ModelSection(id=str(tiny_model)))


def trained(base: Base, folder: Path, kind: str, dtype: str = "float32") -> Path:
    """What a training with `kind` hands on."""
    torch.manual_seed(1)
    section = TrainSection(method=kind, dtype=dtype, **({} if kind == "full" else {"rank": 4}))
    model = method.build(section, base, trust_remote_code=False, attention=None, rows=ROWS)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.03 * torch.randn(parameter.shape)
    for name in ("best", "adapter"):
        (folder / name).mkdir(parents=True)
    method.save(model, folder / "best")
    method.publish(folder / "best", folder / "adapter", base=base, tokenizer=load_tokenizer(base.path))
    return folder / "adapter"


def merged(base: Base, adapter: Path, folder: Path, onto: str = "trained", rows: Any = ROWS) -> dict[str, Any]:
    for name in ("report", "merged"):
        (folder / name).mkdir(parents=True)
    return merge(
        MergeSection(onto=onto),
        base,
        adapter,
        [row.ids for row in ROWS],
        trust_remote_code=False,
        report=folder / "report",
        merged=folder / "merged",
        validation=rows,
    )


def loss(folder: Path) -> float:
    model = load_model(folder, dtype=torch.float32)
    total, count = 0.0, 0
    for row in ROWS:
        labels = torch.tensor([[t if keep else -100 for t, keep in zip(row.ids, row.learned, strict=True)]])
        learned = int((labels[:, 1:] != -100).sum())
        total += float(model(input_ids=torch.tensor([row.ids]), labels=labels).loss.detach()) * learned
        count += learned
    return total / count


def test_qlora_is_merged_onto_what_it_was_trained_against(base: Base, tmp_path: Path) -> None:
    adapter = trained(base, tmp_path / "t", "qlora")
    told = {onto: merged(base, adapter, tmp_path / onto, onto) for onto in ("trained", "full-precision")}
    losses = {onto: loss(tmp_path / onto / "merged") for onto in told}
    assert abs(losses["trained"] - losses["full-precision"]) > 1e-3  # they are two models
    for onto, report in told.items():
        assert report["onto"] == onto
        assert report["validation_loss"] == pytest.approx(losses, rel=1e-4)
        assert report["max_logprob_difference"] < 5e-4
        better = losses[onto] == min(losses.values())
        assert (
            [w for w in report["warnings"] if "is better for these rows" in w] == [] if better else report["warnings"]
        )
    plain, four_bit = (
        load_model(folder / "merged", dtype=torch.float32).state_dict()
        for folder in (tmp_path / "full-precision", tmp_path / "trained")
    )
    name = "model.layers.0.mlp.up_proj.weight"
    exact = quantize.load_quantized(base, torch.float32, trust_remote_code=False)
    kept = quantize.dequantized(exact.model.layers[0].mlp.up_proj)
    published = load_model(base.path, dtype=torch.float32).state_dict()[name]
    torch.testing.assert_close(four_bit[name] - kept, plain[name] - published, atol=1e-5, rtol=0)  # the same update
    assert (kept - published).abs().max() > 0.01


def test_qlora_in_bfloat16_says_how_far_rounding_took_it(base: Base, tmp_path: Path) -> None:
    report = merged(base, trained(base, tmp_path / "t", "qlora", "bfloat16"), tmp_path / "m", rows=())
    assert report["validation_loss"] is None and report["warnings"] == []
    found = report["as_trained_difference"]
    assert found["computed_in"] == "bfloat16" and 0 < found["mean"] < found["max"] < 1
    assert report["max_logprob_difference"] < 5e-4


def test_other_4_bit_weights_are_noticed(base: Base, tmp_path: Path) -> None:
    adapter = trained(base, tmp_path / "t", "qlora")
    told = json.loads((adapter / method.QUANTIZATION).read_text())
    (adapter / method.QUANTIZATION).write_text(json.dumps({**told, "sha256": "0" * 64}))
    assert "not bit for bit" in merged(base, adapter, tmp_path / "m")["warnings"][0]


@pytest.mark.parametrize("damage", ["{", "[]", "{}", '{"type": "fp4"}', '{"type": "nf4", "dtype": 3, "keep": []}'])
def test_a_broken_quantization_file(base: Base, tmp_path: Path, damage: str) -> None:
    adapter = trained(base, tmp_path / "t", "qlora")
    (adapter / method.QUANTIZATION).write_text(damage)
    with pytest.raises(InputError, match=r"quantization\.json"):
        merged(base, adapter, tmp_path / "m")


def test_wrong_4_bit_weights_are_caught(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = trained(base, tmp_path / "t", "qlora")
    real = quantize.dequantized
    monkeypatch.setattr(quantize, "dequantized", lambda layer: real(layer) * 1.02)
    with pytest.raises(EdgetuneError, match="differ from the 4-bit layers"):
        merged(base, adapter, tmp_path / "m")


def test_the_other_base_only_with_its_loss_and_only_for_qlora(base: Base, tmp_path: Path) -> None:
    adapter = trained(base, tmp_path / "t", "qlora")
    with pytest.raises(InputError, match=r"loss of both(?s:.*)--data FILE"):
        merged(base, adapter, tmp_path / "m", "full-precision", ())
    for kind in ("lora", "full"):
        with pytest.raises(InputError, match="not trained against 4-bit"):
            merged(base, trained(base, tmp_path / kind, kind), tmp_path / f"m-{kind}", "full-precision")


@pytest.mark.slow
def test_alone_with_examples_of_ones_own(base: Base, tmp_path: Path, tiny_rows: list[Any]) -> None:
    adapter, data = trained(base, tmp_path / "t", "qlora"), write_jsonl(tmp_path / "rows.jsonl", tiny_rows)
    refused = edgetune("merge", adapter, "--onto", "full-precision", "--out", tmp_path / "out")
    assert refused.returncode == 2 and "--data FILE" in refused.stderr and not (tmp_path / "out").exists()
    done = edgetune("merge", adapter, "--onto", "full-precision", "--data", data, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "full-precision weights" in done.stdout and "(merged)" in done.stdout


def test_a_whole_model_is_passed_on(base: Base, tmp_path: Path) -> None:
    whole = trained(base, tmp_path / "t", "full")
    seal(whole, Work("train", {}, {}), stop_id=7)
    report = merged(base, whole, tmp_path / "m")
    folder = tmp_path / "m/merged"
    assert report["method"] == "full" and report["max_logprob_difference"] == 0 and report["largest_update"] > 0.05
    assert (folder / "model.safetensors").samefile(whole / "model.safetensors")
    assert stop_ids(folder) == [2, 7] and stop_ids(whole) == [2]
    assert load_tokenizer(folder).chat_template == load_tokenizer(base.path).chat_template
    (whole / "model.safetensors").unlink()  # each name stands for itself
    assert load_model(folder, dtype=torch.float32)


def test_a_whole_model_that_learned_nothing_is_reported(base: Base, tmp_path: Path) -> None:
    model = load_model(base.path, dtype=torch.float32)
    (tmp_path / "best").mkdir(), (tmp_path / "whole").mkdir()
    method.save(model, tmp_path / "best")
    method.publish(tmp_path / "best", tmp_path / "whole", base=base, tokenizer=load_tokenizer(base.path))
    assert "changes nothing" in merged(base, tmp_path / "whole", tmp_path / "m")["warnings"][0]


def test_a_whole_model_alone_needs_no_base(base: Base, tmp_path: Path) -> None:
    whole = trained(base, tmp_path / "t", "full")
    found = merge_adapter(whole, tmp_path / "out")
    assert found["largest_update"] is None and found["max_logprob_difference"] == 0
    done = edgetune("merge", whole, "--out", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    (whole / "model.safetensors").write_bytes((whole / "model.safetensors").read_bytes()[:500])
    failed = edgetune("merge", whole, "--out", tmp_path / "third")
    assert failed.returncode == 2 and "Traceback" not in failed.stderr, failed.stderr
