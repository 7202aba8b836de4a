"""A model is quantized layer by layer, written, built into a graph, and computes what its weights on the grid compute."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from edgetune.errors import InputError
from edgetune.export.quantize.calibrate import fitted, quantize_model
from edgetune.export.quantize.checkpoint import Checkpoint
from edgetune.export.quantize.graph import finish
from edgetune.export.quantize.grid import Grid, Quantized
from edgetune.export.quantize.plan import Plan, parts_of
from edgetune.export.quantize.rtn import least_error
from edgetune.export.quantize.smooth import round_inputs
from edgetune.export.quantize.weights import Weights, skeleton
from edgetune.export.quantized import BUILDER_OPTIONS
from edgetune.models import load_model
from edgetune.runtime.kernels import session_options
from edgetune.runtime.providers import open_session
from edgetune.runtime.speculation import MOST_ROWS, ROW_TOKENS

MIXED = Plan(
    Grid(4, 16, True), {"v_proj": Grid(8, 32), "model.layers.1.mlp.down_proj": Grid(8, 64), "lm_head": Grid(8, 32)}
)


def _rows(count: int = 24, length: int = 60) -> list[list[int]]:
    made = torch.Generator().manual_seed(0)
    return torch.randint(3, 384, (count, length), generator=made).tolist()


@pytest.fixture(scope="module")
def phi3(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A random 2-layer Phi-3, untied, with fused matrices, as a folder; the tokenizer is the tiny model's."""
    import shutil

    from transformers import Phi3Config, Phi3ForCausalLM

    folder = tmp_path_factory.mktemp("phi3") / "model"
    torch.manual_seed(1)
    config = Phi3Config(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        original_max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.2,
    )
    Phi3ForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(tiny_model / name, folder / name)
    return folder


def _quantized(folder: Path, plan: Plan, rows: Any = ()) -> dict[str, Quantized]:
    found: dict[str, Quantized] = {}
    quantize_model(folder, plan, rows, found.__setitem__)
    return found


def _rounded(folder: Path, found: dict[str, Quantized]) -> Any:
    """The float model with the weights that lie on the grid."""
    model = load_model(folder, dtype=torch.float32)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                parts = [found[part].dequantize() for part, _ in parts_of(name, module.weight, model.config)]
                module.weight.copy_(torch.cat(parts))
        model.lm_head.weight.copy_(found["lm_head"].dequantize())
        embedding = found.get("model.embed_tokens", found["lm_head"])
        model.get_input_embeddings().weight.copy_(embedding.dequantize())
    return model


def _divergence(model: Any, other: Any, rows: list[list[int]]) -> float:
    with torch.inference_mode():
        p, q = (one(input_ids=torch.tensor(rows)).logits.log_softmax(-1) for one in (model, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("model", ["tiny_model", "phi3"])
def test_a_skeleton_with_its_weights_is_the_model(model: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(model)
    bare, whole = skeleton(folder), load_model(folder, dtype=torch.float32)
    assert all(parameter.is_meta for parameter in bare.parameters())
    with Weights(folder) as weights:
        for name in ("layers", "norm"):
            weights.fill(getattr(bare.model, name), f"model.{name}")
        bare.model.embed_tokens.weight = torch.nn.Parameter(weights.get("model.embed_tokens.weight"))
    ids = torch.tensor([[5, 6, 7, 300]])
    with torch.inference_mode():
        assert torch.equal(bare.model(input_ids=ids).last_hidden_state, whole.model(input_ids=ids).last_hidden_state)


@pytest.mark.parametrize("model", ["tiny_model", "phi3"])
def test_every_matrix_comes_once_on_the_grid_of_the_plan(model: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(model)
    names: list[str] = []
    found: dict[str, Quantized] = {}

    def keep(name: str, one: Quantized) -> None:
        names.append(name)
        found[name] = one

    quantize_model(folder, MIXED, _rows(), keep)
    parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    parts += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    wanted = {f"model.layers.{layer}.{part}" for layer in range(2) for part in parts} | {"lm_head"}
    assert set(names) == wanted | ({"model.embed_tokens"} if model == "phi3" else set())
    assert len(names) == len(set(names))
    assert all(one.grid == MIXED.grid(name) for name, one in found.items())


@pytest.mark.parametrize("model", ["tiny_model", "phi3"])
def test_calibration_is_closer_to_the_model_than_rounding(model: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(model)
    whole, fresh = load_model(folder, dtype=torch.float32), _rows(100)[80:]
    apart = {
        method: _divergence(whole, _rounded(folder, _quantized(folder, plan, _rows(80))), fresh)
        for method in ("min_max", "gptq")
        for plan in [Plan(Grid(4, 32), {"lm_head": Grid(8, 32)}, method)]
    }
    assert apart["gptq"] < 0.85 * apart["min_max"]


@pytest.mark.parametrize("model", ["tiny_model", "phi3"])
def test_a_matrix_has_the_method_that_the_plan_names_for_it(model: str, request: pytest.FixtureRequest) -> None:
    folder, grid = request.getfixturevalue(model), Grid(4, 32, True)
    head, other = "lm_head", "model.layers.0.self_attn.q_proj"
    found, plain = (
        _quantized(folder, Plan(grid, methods=methods), _rows(40))
        for methods in ({head: "least_error", other: "least_error"}, {})
    )
    only = _quantized(folder, Plan(grid, method="min_max", methods={other: "gptq"}), _rows(40))
    with Weights(folder) as weights:
        wanted = weights.get(f"{'model.embed_tokens' if model == 'tiny_model' else head}.weight")
    if model == "tiny_model":  # the first of all: nothing was lost before it
        assert torch.equal(found[head].codes, least_error(wanted, grid).codes)
    near, far = ((one[head].dequantize() - wanted).square().sum() for one in (found, plain))
    assert near < far
    assert not torch.equal(found[other].codes, plain[other].codes)
    assert torch.equal(only[other].codes, plain[other].codes) == (model == "phi3")  # the tied embedding differs


@pytest.mark.parametrize("model", ["tiny_model", "phi3"])
def test_what_was_lost_before_a_matrix_is_made_up_for(
    model: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = request.getfixturevalue(model)
    whole, fresh, plan = load_model(folder, dtype=torch.float32), _rows(140)[120:], Plan(Grid(4, 32, True))
    with_it = _divergence(whole, _rounded(folder, _quantized(folder, plan, _rows(120))), fresh)
    monkeypatch.setattr("edgetune.export.quantize.calibrate.correction", lambda hessian, _: torch.zeros_like(hessian))
    without = _divergence(whole, _rounded(folder, _quantized(folder, plan, _rows(120))), fresh)
    assert with_it < 0.95 * without


def _build(
    merged: Path,
    plan: Plan,
    rows: Any,
    folder: Path,
    *,
    unsigned: bool = False,
    provider: str = "cpu",
    plain: bool = False,
) -> Path:
    checkpoint, artifact = folder / "checkpoint", folder / "artifact"
    checkpoint.mkdir()
    artifact.mkdir()
    writer = Checkpoint(checkpoint, merged, plan)
    quantize_model(merged, plan, rows, writer.keep, keep_float=writer.keep_float, layer_done=writer.layer_done)
    writer.finish()
    job = {
        "model": str(checkpoint),
        "out": str(artifact),
        "precision": "int4",
        "provider": provider,
        "cache": str(folder / "cache"),
        "options": {**BUILDER_OPTIONS, "prune_lm_head": "true", "accuracy_level": "1"},  # 1: float32 sums
    }
    reading, writing = os.pipe()  # the builder's process ends when this end is closed
    command = [sys.executable, "-m", "edgetune.export._builder", json.dumps(job)]
    done = subprocess.run(command, stdin=reading, capture_output=True, text=True, timeout=120)
    os.close(reading)
    os.close(writing)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    finish(
        artifact / "model.onnx",
        checkpoint,
        writer.int8,
        512,
        unsigned=unsigned,
        on_cpu=provider == "cpu",
        plain_lookup=plain,
    )
    return artifact


def _logits(artifact: Path, ids: list[int]) -> torch.Tensor:
    from edgetune.export.verify import Graph

    config = json.loads((artifact / "genai_config.json").read_text(encoding="utf-8"))
    return Graph(artifact, config).logits(ids)


@pytest.mark.parametrize("model", ["tiny_model", "phi3"])
def test_the_graph_computes_with_the_weights_on_the_grid(
    model: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(model)
    artifact = _build(folder, MIXED, _rows(), tmp_path)
    rounded, ids = _rounded(folder, _quantized(folder, MIXED, _rows())), list(range(5, 60))
    with torch.inference_mode():
        wanted = rounded(input_ids=torch.tensor([ids])).logits[0]
    torch.testing.assert_close(_logits(artifact, ids), wanted, rtol=1e-4, atol=1e-4)
    for count, rows in ((MOST_ROWS, MOST_ROWS), (MOST_ROWS + 1, 1), (1, 1)):
        logits, tokens = _last_and_rows(artifact, ids[:count])
        torch.testing.assert_close(logits, wanted[None, count - 1 : count], rtol=1e-4, atol=1e-4)
        assert tokens == wanted[count - rows : count].argmax(-1).tolist()


@pytest.mark.parametrize("model", ["tiny_model", "phi3"])
def test_a_graph_of_16_bit_floats_has_the_same_weights_and_says_its_zero_points(
    model: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder, plan = request.getfixturevalue(model), Plan(Grid(4, 32), {"down_proj": Grid(8, 32, True)})
    artifact = _build(folder, plan, _rows(), tmp_path, provider="cuda")
    rounded, ids = _rounded(folder, _quantized(folder, plan, _rows())), list(range(5, 60))
    with torch.inference_mode():
        wanted = rounded(input_ids=torch.tensor([ids])).logits[0]
    torch.testing.assert_close(_logits(artifact, ids), wanted, rtol=0.02, atol=0.02)
    graph = onnx.load(artifact / "model.onnx").graph
    stored = {one.name: one for one in graph.initializer}
    [lookup] = [node for node in graph.node if node.op_type == "GatherBlockQuantized"]
    assert stored[lookup.input[2]].data_type == onnx.TensorProto.FLOAT16
    assert set(onnx.numpy_helper.to_array(stored[lookup.input[3]]).flat) == {0x88}


@pytest.mark.parametrize(
    ("model", "head"), [("tiny_model", Grid(4, 32, True)), ("phi3", Grid(4, 32)), ("phi3", Grid(8, 32, True))]
)
def test_an_embedding_that_is_written_out_is_the_one_that_was_rounded(
    model: str, head: Grid, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder, plan = request.getfixturevalue(model), Plan(Grid(8, 32, True), {"embed_tokens": head, "lm_head": head})
    artifact = _build(folder, plan, _rows(), tmp_path, provider="dml", plain=True)
    assert not _ops(artifact)["GatherBlockQuantized"]
    found = _quantized(folder, plan, _rows())
    wanted = found.get("model.embed_tokens", found["lm_head"]).dequantize().half()
    [written] = [
        one for one in onnx.load(artifact / "model.onnx").graph.initializer if one.name == "model.embed_tokens.weight"
    ]
    assert torch.equal(torch.from_numpy(onnx.numpy_helper.to_array(written).copy()), wanted)


def _last_and_rows(artifact: Path, ids: list[int]) -> tuple[torch.Tensor, list[int]]:
    """What ONNX Runtime GenAI gets: the last position's logits, and the likeliest token of each of the last ones."""
    import numpy as np

    decoder = json.loads((artifact / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
    session = open_session(artifact / "model.onnx", session_options=session_options(artifact / "model.onnx"))
    feed = {}
    for found in session.get_inputs():
        if found.name.startswith("past"):
            feed[found.name] = np.zeros((1, decoder["num_key_value_heads"], 0, decoder["head_size"]), np.float32)
        else:
            feed[found.name] = np.array([[1] * len(ids) if "mask" in found.name else ids], np.int64)
    logits, tokens = session.run(["logits", ROW_TOKENS], feed)
    return torch.from_numpy(logits), tokens[0].tolist()


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("model", ["tiny_model", "phi3"])
def test_the_graph_rounds_activations_as_we_do(
    model: str, unsigned: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(model)
    plan = Plan(Grid(8, activations="int8"), {"o_proj": Grid(4, 32), "lm_head": Grid(8, 32)}, "min_max", most_error=1.0)
    artifact, found, floats = _build(folder, plan, _rows(), tmp_path, unsigned=unsigned), {}, {}
    assert bool(_stored(artifact, ".uint8")) == unsigned != bool(_stored(artifact, ".int8"))
    quantize_model(folder, plan, _rows(), found.__setitem__, keep_float=floats.__setitem__)
    rounded, ids = _rounded(folder, found), list(range(5, 60))
    assert any("norm" in name for name in floats)
    rounded.load_state_dict(floats, strict=False)
    for name, module in rounded.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.endswith(("o_proj", "lm_head")):
            module.register_forward_pre_hook(lambda _, args: (round_inputs(args[0]),))
    with torch.inference_mode():
        wanted = rounded(input_ids=torch.tensor([ids])).logits[0]
    found_logits = _logits(artifact, ids)
    assert (found_logits - wanted).square().mean() < 1e-3 * wanted.square().mean()
    assert _ops(artifact)["DynamicQuantizeMatMul"] == 6  # qkv, gate and up, down


def _stored(artifact: Path, ending: str) -> list[str]:
    import onnx

    graph = onnx.load(artifact / "model.onnx", load_external_data=False).graph
    return [tensor.name for tensor in graph.initializer if tensor.name.endswith(ending)]


def _ops(artifact: Path) -> Counter[str]:
    import onnx

    return Counter(node.op_type for node in onnx.load(artifact / "model.onnx", load_external_data=False).graph.node)


def test_inputs_that_do_not_bear_rounding_are_spared(tiny_model: Path) -> None:
    plan = Plan(Grid(8, activations="int8"), {"lm_head": Grid(8, 32)}, "min_max", most_error=0)
    found: dict[str, Quantized] = {}
    spared = quantize_model(tiny_model, plan, _rows(), found.__setitem__)
    assert len(spared) == 14
    assert all(error > 0 for error in spared.values())
    assert all(one.grid.activations == "float" for one in found.values())


def test_a_tied_embedding_is_on_disk_once(tiny_model: Path, tmp_path: Path) -> None:
    import onnx_ir

    artifact = _build(tiny_model, Plan(Grid(8, 32), {}, "min_max"), (), tmp_path)
    weights = onnx_ir.load(artifact / "model.onnx").graph.initializers
    head, embedding = (
        weights["lm_head.MatMulNBits.qweight"].const_value,
        weights["model.embed_tokens.codes"].const_value,
    )
    assert isinstance(head, onnx_ir.ExternalTensor)
    assert isinstance(embedding, onnx_ir.ExternalTensor)
    assert (head.offset, head.length) == (embedding.offset, embedding.length)
    named = sum(value.const_value.nbytes for value in weights.values() if value.const_value is not None)
    stored = (artifact / "model.onnx.data").stat().st_size
    assert stored < named - head.length  # where the matrix lay twice, so would its bytes


def test_a_block_that_does_not_divide_gives_way_to_a_smaller_one(tiny_model: Path) -> None:
    found = _quantized(tiny_model, Plan(Grid(4, 128), {}, "min_max"))
    assert {one.grid.block_size for one in found.values()} == {64, 128}
    with pytest.raises(InputError, match="no block size divides the 40 columns of x"):
        fitted("x", Grid(4, 32), 40)


def test_too_few_rows_are_refused_before_anything_is_read(tiny_model: Path) -> None:
    with pytest.raises(InputError, match="too few to calibrate"):
        _quantized(tiny_model, Plan(Grid(4, 32)), [[1, 2, 3]])


def test_weights_that_are_not_numbers_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for path in tiny_model.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight holds numbers"):
        _quantized(broken, Plan(Grid(4, 32), {}, "least_error"))
