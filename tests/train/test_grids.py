"""Training through the export's rounding: what was trained is what is exported, gradients pass, and what cannot be is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file

from edgetune.data.batch import Encoded
from edgetune.errors import InputError
from edgetune.export.package import export
from edgetune.export.quantize import kept
from edgetune.export.quantize.grid import Grid, Quantized
from edgetune.export.quantize.plan import Plan
from edgetune.export.quantize.rtn import min_max
from edgetune.export.quantized import Examples
from edgetune.export.targets import Target, target_for
from edgetune.export.weight_check import read_weights
from edgetune.models import load_tokenizer, resolve
from edgetune.recipe import MergeSection, ModelSection, Recipe, TrainSection
from edgetune.recipe_file import load
from edgetune.run import Work
from edgetune.train import method
from edgetune.train.distill import Taught
from edgetune.train.grids import Begun, GridLora, Rounding, install, nearest
from edgetune.train.merge import merge
from edgetune.train.objective import Objective
from edgetune.train.trainer import Job, train

PLAN = Plan(Grid(4, 16, True), {"v_proj": Grid(8, 32), "lm_head": Grid(4, 32), "o_proj": Grid(4, 32)}, "min_max")
QUICK = {
    "rank": 4,
    "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"],  # the others have no adapter, and are rounded, too
    "learning_rate": 2e-2,
    "batch_size": 4,
    "max_steps": 8,
    "evaluations": 2,
    "samples": 1,
    "quantization_aware": True,
}


def _rows(count: int, start: int = 0) -> list[Encoded]:
    """The second half repeats the first, so that there is something to learn."""
    halves = [[5 + (n * 7 + k * 3) % 300 for k in range(6 + n % 5)] for n in range(start, start + count)]
    return [Encoded([*half, *half], [False] * len(half) + [True] * len(half)) for half in halves]


def _job(folder: Path, rows: int = 16, plan: Plan = PLAN) -> Job:
    base = resolve(ModelSection(id=str(folder)))
    tokenizer = load_tokenizer(base.path)
    return Job(base, tokenizer, _rows(rows), _rows(6, 100), seed=1, key="k", grids=plan)


def _model(
    folder: Path, dtype: str = "float32", plan: Plan = PLAN, begun: dict[str, Quantized] | None = None
) -> tuple[Any, Rounding, Job]:
    job = _job(folder)
    torch.manual_seed(0)
    section = TrainSection.model_validate({**QUICK, "dtype": dtype})
    model = method.build(section, job.base, trust_remote_code=False, attention=None, rows=job.train)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.05)
    return model, install(model, plan, job.base, lambda: begun or nearest(plan, job.base)), job


@pytest.mark.parametrize("grid", [Grid(4, 32), Grid(4, 16, True), Grid(8, 32), Grid(8, 64, True)])
def test_a_matrix_begins_as_it_is_given_and_moves_by_whole_codes(grid: Grid) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 96, generator=draw) * 0.05
    weight[7] = 0
    given = min_max(weight, grid).as_stored()
    given.codes = (given.codes.int() + torch.randint(-2, 3, weight.shape, generator=draw)).clamp(0, grid.top).byte()
    begun, found, nothing = Begun(given, weight), torch.empty_like(weight), torch.zeros_like(weight)
    begun.write(nothing, found)
    assert torch.equal(found, given.dequantize())
    assert torch.equal(begun.quantized(nothing).codes, given.codes)
    step = given.scales.repeat_interleave(grid.block_size, 1)[:, :96]
    begun.write(step, found)
    moved = begun.quantized(step)
    assert torch.equal(found, moved.dequantize())
    live = step != 0
    assert torch.equal(moved.codes[live], (given.codes.int() + 1).clamp(max=grid.top).byte()[live])


def test_what_is_kept_is_read_back(tmp_path: Path) -> None:
    weight = torch.randn(9, 96, generator=torch.Generator().manual_seed(0))
    found = {str(grid): min_max(weight, grid) for grid in (Grid(4, 32), Grid(4, 16, True), Grid(8, 32, True))}
    kept.save(tmp_path / kept.FILE, found)
    again = kept.load(tmp_path / kept.FILE)
    assert again.keys() == found.keys()
    for name, one in found.items():
        assert again[name].grid == one.grid and torch.equal(again[name].dequantize(), one.dequantize())
    (tmp_path / "broken").write_bytes((tmp_path / kept.FILE).read_bytes()[:900])
    for file in ("gone", "broken"):
        with pytest.raises(InputError, match=f"{file}(.|\n)*cannot be read(.|\n)*--from train"):
            kept.load(tmp_path / file)


@pytest.mark.parametrize(("dtype", "how"), [("float32", "gptq"), ("bfloat16", "min_max")])
def test_what_was_trained_is_what_is_exported(tiny_model: Path, tmp_path: Path, dtype: str, how: Any) -> None:
    plan = replace(PLAN, method=how)
    job = _job(tiny_model, 80 if how == "gptq" else 16, plan)
    folders = {name: tmp_path / name for name in ("report", "adapter", "merged", "artifact")}
    for folder in folders.values():
        folder.mkdir()
    section = TrainSection.model_validate({**QUICK, "dtype": dtype})
    report = train(
        section,
        job,
        report=folders["report"],
        adapter=folders["adapter"],
        checkpoints=tmp_path / "ck",
        resume=False,
    )
    told = report["quantization_aware"]
    # of two layers q, k, gate, up, down; o, and the tied head; v
    assert told["grids"] == {"int4 block 16 with zero points": 10, "int4 block 32": 3, "int8 block 32": 2}
    rounded, plain = report["validation"], told["validation"]
    assert rounded["after"]["loss"] < rounded["before"]["loss"]
    assert rounded["before"]["loss"] != plain["before"]["loss"] and rounded["after"]["loss"] != plain["after"]["loss"]

    merge(
        MergeSection(),
        job.base,
        folders["adapter"],
        [row.ids for row in job.validation],
        trust_remote_code=False,
        report=folders["report"],
        merged=folders["merged"],
    )
    quantization = {
        "method": how,
        "bits": 4,
        "block_size": 16,
        "zero_points": True,
        "modules": {
            "v_proj": {"bits": 8, "block_size": 32},
            "lm_head": {"bits": 4, "block_size": 32},
            "o_proj": {"bits": 4, "block_size": 32},
        },
    }
    target = Target(description="", needs="", provider="cpu", precision="int4", quantization=quantization)
    assert target.quantization and target.quantization.plan() == plan
    export(
        folders["merged"],
        target,
        128,
        name="a",
        chain={"base": {"id": "b", "revision": None, "license": None, "sha256": ""}},
        work=Work("export", {}, {}),
        trust_remote_code=False,
        artifact=folders["artifact"],
        report=folders["report"],
        examples=Examples(job.train, trained=folders["adapter"] / kept.FILE),
    )
    found = {name: torch.from_numpy(matrix) for name, matrix in read_weights(folders["artifact"] / "model.onnx")}

    model, rounding, _ = _model(tiny_model, dtype, plan, kept.load(tmp_path / "ck" / kept.FILE))
    set_peft_model_state_dict(model, load_file(folders["adapter"] / "adapter_model.safetensors"))
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7]]))
    layers = {name: module.rounded for name, module in model.named_modules() if isinstance(module, GridLora)}
    layers |= {name: one.parameter.data for name, one in _fixed(model, rounding).items()}
    compared = 0
    for name, matrix in layers.items():
        place = name.removeprefix("base_model.model.").removesuffix(".base_layer")
        wanted = _of_graph(found, place)
        assert torch.equal(matrix, wanted.to(matrix.dtype)), name
        compared += 1
    assert compared == 15


def _fixed(model: Any, rounding: Rounding) -> dict[str, Any]:
    names = {id(p): name.removesuffix(".weight") for name, p in model.named_parameters()}
    return {names[id(one.parameter)]: one for one in rounding.fixed}


def _of_graph(found: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """A matrix of the graph, which has query, key and value as one."""
    if name == "model.embed_tokens":
        return found["/lm_head/MatMul_Q4"] if "/lm_head/MatMul_Q4" in found else _ending(found, "lm_head")
    *_, number, part, last = name.split(".")
    path = f"layers.{number}/{'attn' if part == 'self_attn' else 'mlp'}/"
    if any(f"{path}{last}" in key for key in found):
        return _ending(found, f"{path}{last}")
    whole = _ending(found, f"{path}qkv_proj")
    return dict(zip("qkv", whole.split([64, 32, 32]), strict=True))[last[0]]


def _ending(found: dict[str, torch.Tensor], part: str) -> torch.Tensor:
    return next(matrix for name, matrix in found.items() if part in name)


def test_a_and_b_get_the_gradient_of_the_rounded_weights(tiny_model: Path) -> None:
    model, _, _ = _model(tiny_model)
    layer = next(module for module in model.modules() if isinstance(module, GridLora))
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    slope = torch.randn(7, 64, generator=torch.Generator().manual_seed(2))
    (layer(x) * slope).sum().backward()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    found = [value.grad.clone() for value in (a, b, x)]
    a.grad = b.grad = x.grad = None

    whole = layer.get_base_layer().weight.detach() + (b @ a) * layer.scaling["default"]
    through = layer.rounded
    assert 0 < float((through - whole).norm()) < 0.2 * float(whole.norm())
    ((x @ (through + whole - whole.detach()).T) * slope).sum().backward()
    for value, wanted in zip(found, (a.grad, b.grad, x.grad), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-4)


def test_rounding_follows_the_adapter_and_can_be_off(tiny_model: Path) -> None:
    model, rounding, job = _model(tiny_model)
    section = TrainSection.model_validate({**QUICK, "dtype": "float32", "quantization_aware": False})
    lora = method.build(section, job.base, trust_remote_code=False, attention=None, rows=job.train)
    lora.load_state_dict({name: p for name, p in model.named_parameters() if "lora" in name}, strict=False)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        first = model(input_ids=ids).logits
        with rounding.off():
            plain = model(input_ids=ids).logits
        again = model(input_ids=ids).logits
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.add_(0.05)
        moved = model(input_ids=ids).logits
        torch.testing.assert_close(lora(input_ids=ids).logits, plain, rtol=1e-4, atol=1e-4)
    assert torch.equal(first, again)
    assert not torch.equal(first, plain) and not torch.equal(first, moved)


def test_the_loss_has_the_divergence_from_the_plain_model(tiny_model: Path) -> None:
    model, rounding, job = _model(tiny_model)
    objective = Objective(model, 0, False)
    model.train()
    rows = job.train[:3]
    batch = objective.batch(rows)
    alone = objective.loss(model, batch)
    assert objective.head is not None
    objective.taught = Taught(objective.head, rounding, 3.0)
    taught = objective.loss(model, batch)

    divergence = 0.0
    with torch.no_grad():
        for row in rows:
            now = model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
            with rounding.off():
                plain = model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
            places = [i for i, learned in enumerate(row.learned[1:]) if learned]
            divergence += float((plain.exp() * (plain - now))[places].sum())
    assert divergence > 0
    torch.testing.assert_close((taught - alone).item(), 3 * divergence, rtol=1e-3, atol=1e-4)
    taught.backward()
    slopes = [p.grad for name, p in model.named_parameters() if "lora" in name]
    assert slopes and all(slope is not None and slope.abs().sum() > 0 for slope in slopes)
    assert rounding.on


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"method": "dora"}, "train.method"),
    ({"method": "qlora"}, "train.method"),
    ({"method": "full"}, "train.method"),
    ({"dropout": 0.1}, "train.dropout"),
    ({"initialization": "pissa"}, "train.initialization"),
    ({"modules_to_save": ["lm_head"]}, "train.modules_to_save"),
    ({"neftune_alpha": 5.0}, "train.neftune_alpha"),
    ({"distributed": {"engine": "fsdp"}}, "train.distributed.engine"),
    ({"quantization_aware": False, "distillation": 2.0}, "train.distillation"),
]


@pytest.mark.parametrize(("options", "key"), REFUSED)
def test_what_cannot_be_trained_so_is_refused(tmp_path: Path, options: dict[str, Any], key: str) -> None:
    import yaml

    recipe = {"model": {"id": "m"}, "data": {"train": "d.jsonl"}, "train": {"quantization_aware": True, **options}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(InputError, match=key.replace(".", r"\.")):
        load(str(tmp_path / "r.yaml"), [])


def _recipe(target: str) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"id": "m"},
            "data": {"train": "d.jsonl"},
            "train": {"quantization_aware": True},
            "export": {"target": target},
        }
    )


@pytest.mark.parametrize("target", ["cpu-fp32", "cpu-auto", "tensorrt-rtx-fp16", "qnn-npu"])
def test_a_target_without_grids_of_its_own_is_refused(target: str) -> None:
    with pytest.raises(InputError, match=r"export\.target|train through"):
        target_for(_recipe(target))


def test_int8_activations_beside_others_on_the_same_inputs_are_refused(tiny_model: Path) -> None:
    int8 = Grid(8, activations="int8")
    with pytest.raises(InputError, match="q_proj"):
        _model(tiny_model, plan=Plan(Grid(4, 16), {"q_proj": int8}))
    _, rounding, _ = _model(tiny_model, plan=Plan(Grid(4, 16), {"gate_proj": int8, "up_proj": int8}))
    assert not any("up_proj" in name for name in rounding.grids) and any("down" in name for name in rounding.grids)
