"""Each method on a tiny model: gradients, what is saved, and that it merges into what was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgetune.data.render import Encoded
from edgetune.errors import InputError
from edgetune.models import Base, load_model, load_tokenizer, resolve
from edgetune.recipe import MergeSection, ModelSection, TrainSection
from edgetune.train import dora, initialize, method, neftune, quantize
from edgetune.train.merge import merge
from edgetune.train.objective import Objective

RANK = {"rank": 4, "alpha": 12.0}
METHODS: dict[str, dict[str, Any]] = {
    "lora": RANK,
    "some layers": {**RANK, "target_modules": ["q_proj", "down_proj"]},
    "rslora": {**RANK, "rslora": True},
    "gaussian": {**RANK, "initialization": "gaussian"},
    "pissa": {**RANK, "initialization": "pissa"},
    "pissa rslora": {**RANK, "initialization": "pissa", "rslora": True},
    "olora": {**RANK, "initialization": "olora"},
    "eva": {**RANK, "initialization": "eva"},
    "head": {**RANK, "modules_to_save": ["lm_head"]},
    "embedding and norms": {**RANK, "modules_to_save": ["embed_tokens", "input_layernorm"]},
    "dora": {**RANK, "method": "dora"},
    "dora gaussian": {**RANK, "method": "dora", "initialization": "gaussian"},
    "qlora": {**RANK, "method": "qlora"},
    "loftq": {**RANK, "method": "qlora", "initialization": "loftq"},
    "qlora eva": {**RANK, "method": "qlora", "initialization": "eva"},
    "qlora head": {**RANK, "method": "qlora", "modules_to_save": ["lm_head", "o_proj"], "target_modules": ["q_proj"]},
    "full": {"method": "full"},
}
IDS = torch.tensor([[5, 9, 30, 31, 7, 200, 14]])


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> Base:
    return resolve(ModelSection(id=str(tiny_model)))


def rows(count: int) -> list[Encoded]:
    lengths = [9 + 5 * (n % 7) for n in range(count)]
    return [
        Encoded([3 + (n * 31 + k * k) % 370 for k in range(length)], [k > 3 for k in range(length)])
        for n, length in enumerate(lengths)
    ]


def built(base: Base, options: dict[str, Any], dtype: str = "float32", seed: int = 1, **more: Any) -> Any:
    torch.manual_seed(seed)
    section = TrainSection(dtype=dtype, **options)
    return method.build(section, base, trust_remote_code=False, attention=None, rows=rows(40), **more)


def moved(model: Any, scale: float = 0.03) -> Any:
    """The model after something like training."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return model


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def plain_gradients(model: Any, base: Base) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients from nothing but transformers' model: every weight written out as the method's formula says."""
    plain = load_model(base.path, dtype=torch.float32)
    learned = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if p.requires_grad}
    weights = dict(plain.named_parameters())
    names = {n.removesuffix(".lora_A.default.weight") for n in learned if ".lora_A." in n}
    for name in names:
        layer = model.get_submodule(name)
        frozen = layer.get_base_layer()
        kept = quantize.dequantized(frozen) if hasattr(frozen.weight, "quant_state") else frozen.weight.detach()
        a, b = learned[f"{name}.lora_A.default.weight"], learned[f"{name}.lora_B.default.weight"]
        weight = kept + layer.scaling["default"] * b @ a
        if (length := learned.get(f"{name}.lora_magnitude_vector.default.weight")) is not None:
            weight = weight * (length / weight.norm(dim=1).detach())[:, None]
        weights[f"{name.removeprefix('base_model.model.')}.weight"] = weight
    for name, layer in quantize.layers(model):  # those without an adapter
        plain_name = name.removeprefix("base_model.model.")
        if ".base_layer" not in name:
            weights[f"{plain_name}.weight"] = quantize.dequantized(layer)
    for name, weight in learned.items():
        if ".lora_" not in name:
            plain_name = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
            weights["model.embed_tokens.weight" if "lm_head" in name else plain_name] = weight
    total = torch.zeros(())
    for row in rows(5):
        out = torch.func.functional_call(plain, weights, kwargs={"input_ids": torch.tensor([row.ids])}).logits[0]
        targets = torch.tensor([t if keep else -100 for t, keep in zip(row.ids, row.learned, strict=True)])
        total = total + torch.nn.functional.cross_entropy(out[:-1], targets[1:], reduction="sum")
    found = torch.autograd.grad(total, list(learned.values()))
    return float(total.detach()), dict(zip(learned, found, strict=True))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_those_of_the_formulas(base: Base, name: str, packed: bool) -> None:
    """Float32, against autograd through transformers' own model: within 2e-4 of the largest entry of each gradient."""
    from edgetune.train import attention

    model = moved(built(base, METHODS[name]))
    wanted_loss, wanted = plain_gradients(model, base)
    objective = Objective(model, 0, packed and attention.use(model))
    model.train()
    loss = objective.loss(model, objective.batch(rows(5)))
    loss.backward()
    assert float(loss) == pytest.approx(wanted_loss, rel=1e-5)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for weight, gradient in wanted.items():
        torch.testing.assert_close(found[weight], gradient, rtol=1e-4, atol=2e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize("name", METHODS)
def test_saved_loaded_and_merged_gives_the_trained_logits(base: Base, name: str, tmp_path: Path) -> None:
    model = built(base, METHODS[name])
    before = logits(model)
    wanted = logits(moved(model))
    assert (wanted - before).abs().max() > 0.1
    folders = [tmp_path / part for part in ("best", "adapter", "report", "merged")]
    for folder in folders:
        folder.mkdir()
    best, adapter, report, merged = folders
    method.save(model, best)
    (best / "best.json").write_text("{}")
    method.publish(best, adapter, base=base, tokenizer=load_tokenizer(base.path))
    assert not (adapter / "best.json").exists()
    for file in adapter.glob("*.json"):
        assert str(tmp_path) not in file.read_text()
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=0)  # saving changes nothing

    told = merge(
        MergeSection(), base, adapter, [r.ids for r in rows(3)], trust_remote_code=False, report=report, merged=merged
    )
    torch.testing.assert_close(logits(load_model(merged, dtype=torch.float32)), wanted, rtol=1e-4, atol=1e-3)
    assert told["max_logprob_difference"] < 5e-4 and told["largest_update"] > 0.01 and told["warnings"] == []
    assert told["method"] == (METHODS[name].get("method", "lora") if "dora" not in name else "lora")
    if "qlora" in METHODS[name].values():
        assert told["as_trained_difference"]["max"] < 1e-3
        assert told["as_trained_difference"]["computed_in"] == "float32"
    elif name != "full":  # for whoever has the adapter and the published base, without edgetune
        from peft import PeftModel

        published = PeftModel.from_pretrained(load_model(base.path, dtype=torch.float32), str(adapter))
        torch.testing.assert_close(logits(published), wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in METHODS if "eva" not in name and name != "loftq"])
def test_at_first_nothing_changes(base: Base, name: str) -> None:
    """An adapter starts where the base is, also where it starts from the base's own weights."""
    wanted = load_model(base.path, dtype=torch.float32)
    if METHODS[name].get("method") == "qlora":
        kept = METHODS[name].get("modules_to_save", ())
        wanted = quantize.load_quantized(base, torch.float32, trust_remote_code=False, keep=kept)
    torch.testing.assert_close(logits(built(base, METHODS[name])), logits(wanted), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_only_what_is_trained_is_trained_and_in_float32(base: Base, name: str) -> None:
    model = built(base, METHODS[name], "bfloat16")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    if name != "full":
        assert all("lora_" in n or "modules_to_save" in n for n in trained)
        assert all(p.dtype in (torch.bfloat16, torch.uint8) for p in model.parameters() if not p.requires_grad)
    model.train()
    objective = Objective(model, 0, False)
    objective.loss(model, objective.batch(rows(3))).backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trained
    assert logits(model).isfinite().all()
    if "head" in name or "embedding" in name:
        inner = model.get_base_model()
        head, embedding = inner.get_output_embeddings(), inner.get_input_embeddings()
        assert head.modules_to_save["default"].weight is embedding.modules_to_save["default"].weight


@pytest.mark.parametrize("name", ["lora", "pissa", "olora", "eva", "loftq"])
def test_building_again_gives_the_same_bits(base: Base, name: str) -> None:
    """What resuming rests on: the frozen part is derived anew."""
    first, second = (built(base, METHODS[name]).state_dict() for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    resumed = built(base, METHODS[name], resumed=True).state_dict()
    assert all(torch.equal(first[key], resumed[key]) for key in first if "lora_" not in key)


def test_eva_follows_the_data_and_loftq_nears_the_exact_base(base: Base) -> None:
    exact = logits(load_model(base.path, dtype=torch.float32))
    plain = (logits(built(base, METHODS["qlora"])) - exact).norm()
    better = (logits(built(base, {**METHODS["loftq"], "rank": 16, "alpha": 64})) - exact).norm()
    assert better < 0.9 * plain
    model = built(base, METHODS["eva"])
    a = model.base_model.model.model.layers[0].mlp.down_proj.lora_A["default"].weight
    torch.testing.assert_close(a @ a.t(), torch.eye(4), atol=1e-3, rtol=0)  # orthonormal directions
    assert all(layer.r["default"] == 4 for layer in model.modules() if hasattr(layer, "lora_A"))


def test_eva_on_few_rows_and_directions_that_do_not_settle(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    section = TrainSection(dtype="float32", **METHODS["eva"])
    method.build(section, base, trust_remote_code=False, attention=None, rows=rows(1))
    monkeypatch.setattr(initialize, "_EVA_PASSES", 1)
    with pytest.raises(Exception, match="did not settle"):
        built(base, METHODS["eva"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_validation_leaves_the_4_bit_gradient_as_it_was(base: Base, dtype: str) -> None:
    """bitsandbytes packs weights anew in evaluation mode on some processors, and then has no gradient through them."""
    model = moved(built(base, METHODS["qlora"], dtype))
    objective = Objective(model, 0, False)

    def gradients() -> list[torch.Tensor]:
        model.train()
        model.zero_grad()
        objective.loss(model, objective.batch(rows(3))).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    before, mark = gradients(), quantize.fingerprint(model)
    logits(model)
    assert quantize.fingerprint(model) == mark
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(), strict=True))
    assert all(gradient.abs().max() > 0 for gradient in before)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target_modules": ["q_prj"]}, r"no layer `q_prj`.*\n.*q_proj.*all-linear"),
        ({"modules_to_save": ["hed"]}, r"no layer `hed`.*\n.*lm_head"),
        ({"target_modules": ["q_proj", "lm_head"]}, r"one matrix.*\n.*modules_to_save: \[lm_head\]"),
        ({"target_modules": ["embed_tokens"]}, "one matrix"),
        ({"rank": 40, "initialization": "pissa"}, "k_proj has 32"),
        ({"rank": 40, "initialization": "olora", "target_modules": ["k_proj"]}, "has 32"),
        ({"target_modules": ["input_layernorm"]}, r"input_layernorm is a LlamaRMSNorm, .*\n.*q_proj"),
        ({"target_modules": ["layers"]}, r"model\.layers is a ModuleList"),
        ({"modules_to_save": ["self_attn"]}, r"self_attn is a LlamaAttention, no single layer\n.*norm"),
        ({"modules_to_save": ["model"]}, r"model is a LlamaModel"),
    ],
)
def test_layers_that_cannot_be_trained(base: Base, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=r"train\.\w+: (?s:.*)" + said):
        built(base, options)


def test_a_large_rank_is_fine_where_nothing_is_taken_from_the_base(base: Base) -> None:
    assert built(base, {"rank": 40, "initialization": "pissa", "target_modules": ["q_proj"]})
    assert built(base, {"rank": 100})


def test_qlora_needs_bitsandbytes(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"edgetune\[qlora\]"):
        built(base, METHODS["qlora"])
    method.require_installed(TrainSection())
    for options in ({"method": "qlora"}, {"optimizer": "adamw_8bit"}):
        with pytest.raises(InputError, match=r"train\.(method|optimizer): bitsandbytes"):
            method.require_installed(TrainSection(**options))


@pytest.mark.parametrize("shards", [False, True])
def test_a_whole_model_is_published_with_its_tokenizer(base: Base, tmp_path: Path, shards: bool) -> None:
    model = moved(built(base, METHODS["full"]))
    best, out = tmp_path / "best", tmp_path / "out"
    best.mkdir(), out.mkdir()
    if shards:
        model.save_pretrained(best, max_shard_size="100KB")
    else:
        method.save(model, best)
    method.publish(best, out, base=base, tokenizer=load_tokenizer(base.path))
    assert len(list(out.glob("*.safetensors"))) == (1 if not shards else len(list(best.glob("*.safetensors"))))
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    torch.testing.assert_close(logits(load_model(out, dtype=torch.float32)), logits(model), rtol=0, atol=0)
    assert load_tokenizer(out).chat_template == load_tokenizer(base.path).chat_template
    assert resolve(ModelSection(id=str(out)))  # a base for the next training


def test_noise_is_on_embeddings_in_training_only_and_as_large_as_each_row_calls_for(base: Base) -> None:
    alpha, lengths = 5.0, [3, 40]
    model = built(base, {**METHODS["lora"], "neftune_alpha": alpha})
    inner = model.get_base_model()
    embedding, decoder = inner.get_input_embeddings(), inner.get_decoder()
    ids = torch.arange(3, 3 + sum(lengths))[None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    seen: list[torch.Tensor] = []
    embedding.register_forward_hook(
        lambda module, args, out: seen.append(out.detach() - module.weight[args[0]].detach())
    )

    model.train()
    torch.manual_seed(3)
    decoder(input_ids=ids, position_ids=positions)
    for part, length in zip(seen[0].split(lengths, 1), lengths, strict=True):
        most = alpha / (length * 64) ** 0.5
        assert 0.9 * most < float(part.abs().max()) <= most * 1.001
    torch.manual_seed(3)
    decoder(input_ids=ids, position_ids=positions)
    assert torch.equal(seen[0], seen[1])  # drawn from the state that checkpoints hold
    mask = torch.tensor([[1] * 3 + [0] * 37, [1] * 40])
    decoder(input_ids=torch.ones(2, 40, dtype=torch.long), attention_mask=mask)
    assert float(seen[2][1].abs().max()) <= alpha / (40 * 64) ** 0.5 * 1.001 < float(seen[2][0].abs().max())
    model.eval()
    decoder(input_ids=ids)
    assert float(seen[3].abs().max()) == 0


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.floats(0.1, 8), st.integers(0, 99))
def test_lengths_of_rows_without_the_matrix(out: int, size: int, rank: int, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, a, b = (torch.randn(shape, generator=generator) for shape in ((out, size), (rank, size), (out, rank)))
    wanted = (weight.double() + scale * b.double() @ a.double()).norm(dim=1).float()
    atol = 1e-3 * float(weight.norm() + scale * b.norm() * a.norm())
    torch.testing.assert_close(dora.lengths(weight, a, b, scale), wanted, atol=atol, rtol=1e-4)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_row_lengths_of_packed_rows(lengths: list[int]) -> None:
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    found = neftune.row_lengths(torch.zeros(1, sum(lengths), 2), positions, None)
    assert found[0].tolist() == [length for length in lengths for _ in range(length)]


def test_compute_dtype_is_the_recipes_or_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    assert method.base_dtype(TrainSection(dtype="bfloat16")) == torch.bfloat16
    assert method.base_dtype(TrainSection(dtype="float32")) == torch.float32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for has, wanted in (({"avx2": True}, torch.float32), ({"avx512_bf16": True}, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: has)
        assert method.base_dtype(TrainSection()) == wanted
