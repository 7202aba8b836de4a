"""Export of the tiny model, and the gate on it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from conftest import edgetune, write_jsonl
from edgetune.errors import EdgetuneError, InputError
from edgetune.export.verify import failures
from edgetune.recipe import ExportSection, Limits
from edgetune.runtime.artifact import open_artifact
from edgetune.runtime.options import GenerationOptions
from edgetune.runtime.session import Session
from edgetune.standalone import export_model
from edgetune.standalone_verify import verify_artifact


@pytest.fixture(scope="module")
def artifact(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "tiny"
    export_model(tiny_model, out, ExportSection(target="cpu-fp32", max_length=100))
    return out


@pytest.fixture
def rows(tmp_path: Path, tiny_rows: list[dict[str, Any]]) -> Path:
    return write_jsonl(tmp_path / "held_out.jsonl", tiny_rows)


def test_an_artifact_has_what_the_design_says(artifact: Path, tiny_model: Path) -> None:
    names = {path.name for path in artifact.iterdir()}
    assert names >= {
        "genai_config.json", "model.onnx", "model.onnx.data", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "golden.json", "inference_model.json", "README.md", "manifest.json",
    }  # fmt: skip
    config = json.loads((artifact / "genai_config.json").read_text())
    assert config["search"]["max_length"] == 100 and config["model"]["context_length"] == 512
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert set(manifest["outputs"]) == names - {"manifest.json"}
    golden = json.loads((artifact / "golden.json").read_text())
    assert golden["stop_ids"] == [2] and len(golden["prompts"]) == 4
    template = json.loads((artifact / "inference_model.json").read_text())["PromptTemplate"]
    assert "{Content}" in template["prompt"] and "{Content}" in template["assistant"]


def test_nothing_in_it_names_this_machine(artifact: Path, tiny_model: Path) -> None:
    for path in artifact.iterdir():
        data = path.read_bytes()
        for word in (str(tiny_model), str(artifact.parent), str(Path.home())):
            assert word.encode() not in data, f"{path.name} has {word}"


def test_it_loads_in_plain_onnxruntime_genai(artifact: Path) -> None:
    from edgetune.runtime import genai

    og = genai()
    model = og.Model(str(artifact))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=12, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(og.Tokenizer(model).encode("What is"))
    generator.generate_next_token()
    assert len(generator.get_sequence(0)) > 1


def test_float32_passes_with_next_to_no_difference(
    artifact: Path, tiny_model: Path, rows: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("x")
    report = verify_artifact(artifact, tiny_model, rows, 5, {}, tmp_path / "out")
    assert (tmp_path / "out/thesis.txt").read_text() == "x"
    assert report["passed"] and report["kld_mean"] < 1e-5 and report["top1_agreement"] == 1.0
    assert report["perplexity"]["ratio"] == pytest.approx(1, abs=1e-4) and report["rows"] == 5
    assert report["kld_mean"] <= report["kld_p99"] <= report["kld_max"]
    assert [text["divergent_at"] for text in report["golden"]] == [None] * 4
    assert json.loads((tmp_path / "out/report.json").read_text())["passed"] is True


def test_another_model_fails_and_the_numbers_are_right(
    artifact: Path, tiny_model: Path, other_model: Path, rows: Path
) -> None:
    """KL divergence and perplexity against a straightforward computation over whole rows."""
    import torch
    from transformers import AutoTokenizer

    from edgetune.models import load_model

    changed = load_model(other_model, dtype=torch.float32)
    report = verify_artifact(artifact, other_model, rows, 3, {}, None)
    assert "too few" in report["warnings"][0]
    assert not report["passed"] and any("kld_mean" in text for text in report["failures"])
    tokenizer, original = AutoTokenizer.from_pretrained(tiny_model), load_model(tiny_model, dtype=torch.float32)
    kld, loss, count = 0.0, 0.0, 0
    for line in rows.read_text().splitlines()[:3]:
        messages = json.loads(line)["messages"]
        start = len(
            tokenizer(tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True))[
                "input_ids"
            ]
        )
        ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False))["input_ids"]
        end = max(i for i, token in enumerate(ids) if token == 2) + 1
        p, q = (m(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1) for m in (changed, original))
        at = slice(start - 1, end - 1)
        kld += (p[at].exp() * (p[at] - q[at])).sum().item()
        loss -= sum(q[i - 1, ids[i]].item() for i in range(start, end))
        count += end - start
    assert report["tokens"] == count
    assert report["kld_mean"] == pytest.approx(kld / count, rel=1e-3)
    assert report["perplexity"]["artifact"] == pytest.approx(torch.tensor(loss / count).exp().item(), rel=1e-3)


def test_gate_on_the_command_line(artifact: Path, tiny_model: Path, rows: Path) -> None:
    ask = ["verify", artifact, "--against", tiny_model, "--data", rows, "--rows", "2"]
    passed = edgetune(*ask, "--json")
    assert passed.returncode == 0 and json.loads(passed.stdout)["passed"], passed.stderr
    missed = edgetune(*ask, "--limit", "kld_mean=1e-12", "--limit", "top1_agreement=1")
    assert missed.returncode == 3 and "kld_mean" in missed.stderr and "NOT PASSED" in missed.stdout
    wrong = edgetune(*ask, "--limit", "kld=1")
    assert wrong.returncode == 2 and "kld_mean" in wrong.stderr


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"kld_mean": 0.06}, ["kld_mean"]),
        ({"kld_p99": 0.6}, ["kld_p99"]),
        ({"top1_agreement": 0.89}, ["top1_agreement"]),
        ({"perplexity": {"ratio": 1.06}}, ["perplexity_ratio"]),
        ({"kld_mean": float("nan")}, ["kld_mean"]),
    ],
)
def test_each_limit_is_looked_at(changes: dict[str, Any], expected: list[str]) -> None:
    good = {"kld_mean": 0.01, "kld_p99": 0.1, "top1_agreement": 0.97, "perplexity": {"ratio": 1.0}}
    found = failures({**good, **changes}, Limits())
    assert [text.split()[0] for text in found] == expected


def test_a_window_of_attention_is_kept(tiny_model: Path, tmp_path: Path) -> None:
    """A float32 export compares its tokens with the model's, over prompts longer than the window."""
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = Phi3Config(vocab_size=384, sliding_window=16, initializer_range=0.2, **sizes, **ids)
    Phi3ForCausalLM(config).save_pretrained(model)
    export_model(model, tmp_path / "out", ExportSection(target="cpu-fp32", max_length=128))
    with Session(open_artifact(tmp_path / "out")) as session:
        answer = session.generate("Hello", GenerationOptions(max_tokens=100))
    assert answer.completion_tokens == 100 or answer.finish_reason == "stop"


def test_what_cannot_be_exported(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    unknown = tmp_path / "gpt2"
    GPT2LMHeadModel(
        GPT2Config(vocab_size=384, n_embd=32, n_layer=1, n_head=2, n_positions=64, eos_token_id=2)
    ).save_pretrained(unknown)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(unknown)
    with pytest.raises(InputError, match="does not know the architecture GPT2LMHeadModel"):
        export_model(unknown, tmp_path / "out", ExportSection(max_length=32))
    plain = Path(shutil.copytree(tiny_model, tmp_path / "no-template"))
    (plain / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="chat template"):
        export_model(plain, tmp_path / "out", ExportSection(max_length=32))
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError):
        export_model(tmp_path / "nothing", tmp_path / "out", ExportSection())


def test_a_builder_that_fails_is_one_message_and_its_log_is_kept(
    tiny_model: Path, tmp_path: Path, own_home: Path
) -> None:
    target = tmp_path / "odd.yaml"
    target.write_text("description: x\nneeds: y\nprovider: cpu\nprecision: int4\noptions: {block_size: 17}\n")
    with pytest.raises(EdgetuneError) as caught:
        export_model(tiny_model, tmp_path / "out", ExportSection(target=str(target)))
    assert caught.value.exit_code == 1 and "the model builder failed: " in caught.value.what
    assert "\n" not in caught.value.what and not (tmp_path / "out").exists()
    kept = own_home / "logs/builder-out.log"
    assert str(kept) in str(caught.value.fix) and "Traceback" in kept.read_text()


def test_phi3_exports_and_passes(tmp_path: Path) -> None:
    from conftest import SHARED

    model = SHARED / "models/stories15M-phi3"
    if not model.is_dir():
        pytest.skip("needs ../shared/models/stories15M-phi3, which lies beside the checkout of developers only")
    rows = write_jsonl(tmp_path / "rows.jsonl", [
        {"messages": [{"role": "user", "content": "Tell me a story."}, {"role": "assistant", "content": "Once upon a time there was a dog."}]},
        {"messages": [{"role": "user", "content": "Another."}, {"role": "assistant", "content": "A girl had a red ball."}]},
    ])  # fmt: skip
    export_model(model, tmp_path / "phi3", ExportSection(target="cpu-fp32"))
    report = verify_artifact(tmp_path / "phi3", model, rows, None, {}, None)
    assert report["passed"] and report["kld_mean"] < 1e-4


def _leaves_out(warnings: list[str]) -> bool:
    return any(" of 4 golden prompts were left out: with an answer they do not fit" in text for text in warnings)


def test_golden_prompts_that_a_short_context_does_not_hold(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    """A quantized graph has no angles for positions beyond its context."""
    export_model(tiny_model, tmp_path / "short", ExportSection(target="cpu-int8", max_length=64))
    report = verify_artifact(tmp_path / "short", tiny_model, rows, 4, {}, None)
    assert 0 < len(report["golden"]) < 4 and all(0 < answer["tokens"] <= 64 - 42 for answer in report["golden"])
    assert _leaves_out(report["warnings"])


def test_a_run_with_a_short_context_goes_to_its_end(
    tiny_model: Path, tiny_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "rows.jsonl", tiny_rows)
    (tmp_path / "tiny.yaml").write_text(
        f"model: {{id: {tiny_model}}}\ndata: {{train: rows.jsonl, validation: {{auto: 0.25}}}}\n"
        "train: {rank: 4, max_steps: 1, batch_size: 4, evaluations: 1, samples: 0}\n"
        "export: {target: cpu-int8, max_length: 64}\n"
        "verify: {rows: 2, limits: {kld_mean: 9, kld_p99: 9, top1_agreement: 0, perplexity_ratio: 9}}\n"
        "bench: {prompt_tokens: 16, new_tokens: 4, warmup: 0, repetitions: 1}\n"
    )
    done = edgetune("run", "tiny.yaml", cwd=tmp_path)
    assert done.returncode == 0 and _leaves_out([done.stderr]), done.stderr


def test_numbers_that_are_none_name_their_folder(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = Path(shutil.copytree(tiny_model, tmp_path / "nan"))
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    for judged, reference, code in ((tiny_model, broken, 2), (broken, tiny_model, 3)):
        with pytest.raises(EdgetuneError, match="not finite numbers, first in row 1") as caught:
            verify_artifact(judged, reference, rows, 4, {}, None)
        assert caught.value.where == str(broken) and caught.value.exit_code == code


def test_its_card_has_what_was_measured(artifact: Path, tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(artifact, tmp_path / "own"))
    assert "at most 0.25 nats" not in (own / "README.md").read_text()
    verify_artifact(own, tiny_model, rows, 2, {"kld_mean": 0.25}, None)
    card = (own / "README.md").read_text()
    assert "Nothing yet" not in card and "| gate | passed |" in card and "mean KL divergence at most 0.25 nats" in card
    short = ("--prompt-tokens", "20", "--new-tokens", "4", "--warmup", "0", "--repetitions", "1", "--loads", "0")
    done = edgetune("bench", own, *short)
    assert done.returncode == 0, done.stderr
    verify_artifact(own, tiny_model, rows, 3, {}, None)
    again = (own / "README.md").read_text()
    assert again.count("| gate |") == 1 and again.index("| gate |") < again.index("| measured on |")
    assert "| decode |" in again and again.count("## ") == card.count("## ")
    open_artifact(own)  # card and manifest agree


@pytest.mark.parametrize("how", ["another model", "in use", "cannot be written"])
def test_a_card_that_is_left_alone(
    how: str,
    artifact: Path,
    tiny_model: Path,
    other_model: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from edgetune.export import card as module

    def refused(*_: Any) -> None:
        raise PermissionError

    own = Path(shutil.copytree(artifact, tmp_path / "own"))
    before = (own / "README.md").read_text()
    if how == "in use":
        monkeypatch.chdir(own)
    if how == "cannot be written":
        monkeypatch.setattr(module, "rewrite_card", refused)
    verify_artifact(own, other_model if how == "another model" else tiny_model, rows, 2, {}, None)
    assert (own / "README.md").read_text() == before
    assert how == "another model" or "the card" in capsys.readouterr().err


def test_a_limit_of_nothing_lifts_it() -> None:
    from edgetune.recipe_file import limits_from

    assert limits_from(["top1_agreement=0"]) == {"top1_agreement": 0}
