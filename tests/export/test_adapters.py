"""Adapters that stay beside the base: the graph, the files, what is refused, and switching at run time."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from artifacts import edit_json, tiny_artifact  # noqa: F401 - a fixture
from conftest import edgetune, write_jsonl
from edgetune import recipe_file
from edgetune.deploy.bundle import package, unpack
from edgetune.errors import InputError
from edgetune.export.adapters.graph import add_branches, without_branches
from edgetune.export.adapters.read import read_adapters
from edgetune.models import resolve
from edgetune.pipeline import Pipeline
from edgetune.recipe import ExportSection, ModelSection
from edgetune.run import read_manifest
from edgetune.runtime import load
from edgetune.runtime.chat import Chat
from edgetune.runtime.conversation import Conversation
from edgetune.runtime.options import GenerationOptions
from edgetune.standalone import _adapter_at, export_model, merge_adapter
from edgetune.standalone_verify import verify_artifact

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPT = "The capital of"


def adapter(base: Path, folder: Path, seed: int = 0, **config: Any) -> Path:
    """A peft adapter with random weights that change the base's answers."""
    import torch
    from peft import LoraConfig, get_peft_model

    from edgetune.models import load_model

    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "task_type": "CAUSAL_LM", **config}
    model = get_peft_model(load_model(base, dtype=torch.float32), LoraConfig(**options))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def two(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters of different ranks, layers and scales."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "wide": adapter(tiny_model, folder / "wide", 1, use_rslora=True),
        "narrow": adapter(
            tiny_model,
            folder / "narrow",
            2,
            r=2,
            target_modules=["q_proj", "v_proj", "down_proj"],
            rank_pattern={"layers.1.self_attn.v_proj": 6},
            alpha_pattern={"down_proj": 20},
        ),
    }


@pytest.fixture(scope="module")
def skills(tiny_model: Path, two: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 artifact with both. Read only."""
    out = tmp_path_factory.mktemp("artifact") / "skills"
    section = ExportSection(target="cpu-fp32", max_length=128)
    export_model(tiny_model, out, section, adapters=[f"{name}={folder}" for name, folder in two.items()])
    return out


@pytest.fixture(scope="module")
def plain(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same artifact without adapters. Read only."""
    out = tmp_path_factory.mktemp("plain") / "skills"
    export_model(tiny_model, out, ExportSection(target="cpu-fp32", max_length=128))
    return out


def wanted(base: Path, folder: Path | None, ids: list[int], tokens: int) -> list[int]:
    """Greedy tokens of peft's own model."""
    import torch
    from peft import PeftModel

    from edgetune.models import load_model

    model: Any = load_model(base, dtype=torch.float32)
    if folder is not None:
        model = PeftModel.from_pretrained(model, str(folder))
    found = list(ids)
    with torch.inference_mode():
        for _ in range(tokens):
            found.append(int(model(input_ids=torch.tensor([found])).logits[0, -1].argmax()))
            if found[-1] == 2:
                break
    return found[len(ids) :]


def test_each_adapter_gives_pefts_tokens_and_none_the_bases(
    tiny_model: Path, two: dict[str, Path], skills: Path
) -> None:
    with load(skills) as session:
        assert session.adapters == ("wide", "narrow")
        ids = session.encode(PROMPT)
        right = {name: wanted(tiny_model, folder, ids, 24) for name, folder in two.items()}
        right["none"] = wanted(tiny_model, None, ids, 24)
        assert len({tuple(tokens) for tokens in right.values()}) == 3, "the adapters change nothing"
        options = GenerationOptions(max_tokens=24, reuse="fast")  # what one adapter has read is nothing to another
        for name in ("wide", "none", "narrow", "wide", "narrow", "none"):  # back and forth
            assert list(session.generate(PROMPT, options, adapter=name).ids) == right[name]
        assert list(session.generate(PROMPT, options).ids) == right["none"], "of several none is on by itself"
        chosen = GenerationOptions(max_tokens=24, adapter="wide")
        assert list(session.generate(PROMPT, chosen).ids) == right["wide"]
        *_, last = session.stream(PROMPT, options, adapter="narrow")
        assert last.completion is not None and list(last.completion.ids) == right["narrow"]


def test_an_adapter_that_is_not_there_is_refused_with_those_that_are(
    skills: Path,
    tiny_artifact: Path,  # noqa: F811
) -> None:
    with load(skills) as session, pytest.raises(InputError, match="'tidy': it has wide, narrow"):
        session.stream(PROMPT, adapter="tidy")
    with load(tiny_artifact) as session, pytest.raises(InputError, match="it carries none"):
        session.generate(PROMPT, adapter="tidy")


_PLAIN = """
import json, sys
import onnxruntime_genai as og
folder, ids = sys.argv[1], json.loads(sys.argv[2])
model = og.Model(folder)
adapters = og.Adapters(model)
for name in sys.argv[3:]:
    adapters.load(f"{folder}/{name}.onnx_adapter", name)
for name in [*sys.argv[3:], None, sys.argv[3]]:
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + 12, do_sample=False)
    generator = og.Generator(model, params)
    if name:
        generator.set_active_adapter(adapters, name)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    print(json.dumps([int(token) for token in generator.get_sequence(0)][len(ids):]))
assert not [name for name in sys.modules if name.startswith("edgetune")]
"""


def test_plain_onnxruntime_genai_switches_them(tiny_model: Path, two: dict[str, Path], skills: Path) -> None:
    with load(skills) as session:
        ids = session.encode(PROMPT)
    said = subprocess.run(
        [sys.executable, "-c", _PLAIN, str(skills), json.dumps(ids), *two],
        env={**os.environ, "ORT_DISABLE_TELEMETRY": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    wide, narrow, none, again = map(json.loads, said.splitlines())
    assert wide == again == wanted(tiny_model, two["wide"], ids, 12)
    assert narrow == wanted(tiny_model, two["narrow"], ids, 12)
    assert none == wanted(tiny_model, None, ids, 12)


@pytest.mark.parametrize(
    ("activations", "modules"),
    [
        pytest.param("float", {}, marks=pytest.mark.slow),
        pytest.param("int8", {}, marks=pytest.mark.slow),
        ("int8", {"down_proj": {"bits": 4, "block_size": 32}}),
    ],
    ids=["weights only", "all smoothed", "mixed"],
)
def test_beside_quantized_weights_it_is_as_near_as_the_base(
    activations: str, modules: dict[str, Any], tiny_model: Path, two: dict[str, Path], tmp_path: Path
) -> None:
    """Smoothing divides what branches read and add to. Forgotten, the adapter's part would be another one."""
    target = {
        "description": "d",
        "needs": "n",
        "provider": "cpu",
        "precision": "int8",
        "quantization": {
            "bits": 8,
            "block_size": 32,
            "activations": activations,
            "method": "min_max",
            "modules": modules,
        },
    }
    file, out, merged = tmp_path / "own.yaml", tmp_path / "out", tmp_path / "merged"
    file.write_text(json.dumps(target))
    texts = [{"text": f"{PROMPT} number {n} is {n * n}, and so on. " * 9} for n in range(24)]
    rows = write_jsonl(tmp_path / "rows.jsonl", texts)
    section = ExportSection(target=str(file), max_length=128)
    export_model(tiny_model, out, section, data=rows, adapters=[f"wide={two['wide']}"])
    merge_adapter(two["wide"], merged, ModelSection(id=str(tiny_model)))
    with_adapter = verify_artifact(out, merged, rows, 4, {}, None)
    base = verify_artifact(out, tiny_model, rows, 4, {}, None, adapter="none")
    other = verify_artifact(out, merged, rows, 4, {}, None, adapter="none")
    assert with_adapter["adapter"] == "wide" and "adapter" not in base
    assert with_adapter["kld_mean"] < max(3 * base["kld_mean"], 1e-3)
    assert with_adapter["kld_mean"] < 0.05 * other["kld_mean"], "the adapter matters here"


def test_a_run_keeps_its_adapter_apart(
    tiny_model: Path, tiny_rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", tiny_rows)
    settings = {
        "model": {"id": str(tiny_model)},
        "data": {"train": "rows.jsonl", "validation": {"auto": 0.25}},
        "train": {"rank": 4, "learning_rate": 0.01, "epochs": 2, "batch_size": 4, "initialization": "olora"},
        "export": {"target": "cpu-fp32", "max_length": 128, "adapters": "separate"},
        "verify": {"rows": 3, "golden_tokens": 4},
        "bench": {"prompt_tokens": 16, "new_tokens": 4, "warmup": 0, "repetitions": 2},
    }
    (tmp_path / "tiny.yaml").write_text(json.dumps(settings))
    result = Pipeline(recipe_file.load("tiny.yaml", [])).run()
    run, told = tmp_path / "runs/tiny", result.reports
    assert result.missed is None and told["verify"]["adapter"] == "tiny"
    assert told["verify"]["kld_mean"] < 1e-4 and told["verify"]["top1_agreement"] == 1
    assert told["verify"]["base"]["kld_mean"] < 1e-4 and told["verify"]["base"]["tokens"] > 0
    assert told["bench"]["target"]["adapter"] == "tiny"
    assert {found["what"] for found in told["bench"]["comparison"]["ratios"]} == {"prefill", "decode"}
    with load(run) as session:  # the only adapter is on by itself: a run's artifact answers as it was trained
        assert session.adapters == ("tiny",)
        ids = session.encode(PROMPT)
        options = GenerationOptions(max_tokens=12)
        trained = wanted(tiny_model, run / "adapter", ids, 12)
        assert list(session.generate(PROMPT, options).ids) == trained == wanted(run / "merged", None, ids, 12)
        assert list(session.generate(PROMPT, options, adapter="none").ids) == wanted(tiny_model, None, ids, 12)
    card = (run / "artifact/README.md").read_text()
    assert "| `tiny` | 8 |" in card, "olora is published for the base as it was, at twice the rank"
    assert "were the adapter merged" in card and "times as fast" in card
    again = Pipeline(recipe_file.load("tiny.yaml", [])).run()
    assert not any(again.done.values())
    changed = Pipeline(recipe_file.load("tiny.yaml", ["export.adapters=merged"])).run(until="export")
    assert [stage for stage, why in changed.done.items() if why] == ["export"]
    assert not [*(run / "artifact").glob("*.onnx_adapter")]


def test_a_prompt_on_disk_is_of_one_adapter(skills: Path, tmp_path: Path) -> None:
    """What was read under an adapter is taken up under it, and answered as where it is read."""
    prompt, options = "A town " * 15, GenerationOptions(max_tokens=4, logprobs=1)
    with load(skills) as plain:
        for count, name in enumerate(("wide", "narrow", "none"), 1):
            for known in (False, True):
                with load(skills, prompt_cache=tmp_path) as session:
                    answer = session.generate(prompt, options, adapter=name)
                    assert (answer.cached_tokens > 0) == known
                    wanted = plain.generate(prompt, options, adapter=name, reuse="off")
                    assert (answer.ids, answer.logprobs) == (wanted.ids, wanted.logprobs)
                    session.read(prompt, adapter=name)
            assert len(list(tmp_path.iterdir())) == count


def test_the_graph_without_branches_is_the_graph_before(skills: Path, plain: Path, tmp_path: Path) -> None:
    import onnx

    without_branches(skills / "model.onnx", tmp_path / "model.onnx")

    def shown(file: Path) -> tuple[list[Any], set[str], set[str]]:
        graph = onnx.load(file, load_external_data=False).graph
        nodes = [(node.name, node.op_type, list(node.input), list(node.output)) for node in graph.node]
        return nodes, {value.name for value in graph.input}, {tensor.name for tensor in graph.initializer}

    assert shown(tmp_path / "model.onnx") == shown(plain / "model.onnx")
    assert (skills / "model.onnx.data").read_bytes() == (plain / "model.onnx.data").read_bytes()


def test_the_same_adapters_give_the_same_files(
    tiny_model: Path, two: dict[str, Path], skills: Path, tmp_path: Path
) -> None:
    section = ExportSection(target="cpu-fp32", max_length=128)
    export_model(tiny_model, tmp_path / "skills", section, adapters=[f"{n}={folder}" for n, folder in two.items()])
    first, second = (read_manifest(folder)["outputs"] for folder in (skills, tmp_path / "skills"))
    assert {n: e for n, e in first.items() if n != "README.md"} == {n: e for n, e in second.items() if n != "README.md"}


def test_an_adapters_file_is_checked_packed_and_unpacked(skills: Path, tmp_path: Path) -> None:
    packed = package(skills, "zip", tmp_path / "one")
    back = unpack(Path(packed["path"]), tmp_path / "back")
    with load(back["path"]) as session:
        assert session.adapters == ("wide", "narrow")
    changed = Path(shutil.copytree(skills, tmp_path / "changed"))
    file = changed / "wide.onnx_adapter"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match="is not the file that was exported"):
        load(changed)
    shutil.copy(skills / "wide.onnx_adapter", file)
    shutil.copy(file, changed / "other.onnx_adapter")
    with pytest.raises(InputError, match="not in the manifest"):
        load(changed)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["../x"], "is no name for an adapter"),
        (["none"], "asks for no adapter"),
        (["a", "a"], "the name a is given twice"),
        (["a", "A"], "differ in case only"),
    ],
)
def test_names_that_cannot_be_used(
    names: list[str], message: str, tiny_model: Path, two: dict[str, Path], tmp_path: Path
) -> None:
    given = [f"{name}={two['wide']}" for name in names]
    with pytest.raises(InputError, match=message):
        export_model(tiny_model, tmp_path / "out", ExportSection(target="cpu-fp32"), adapters=given)
    assert not (tmp_path / "out").exists()


def test_a_run_names_its_adapter(tmp_path: Path) -> None:
    (tmp_path / "runs/tone/adapter").mkdir(parents=True)
    for text in (f"{tmp_path}/runs/tone", f"{tmp_path}/runs/tone/adapter"):
        assert _adapter_at(text) == ("tone", tmp_path / "runs/tone/adapter")
    assert _adapter_at(f"t={tmp_path}/runs/tone") == ("t", tmp_path / "runs/tone/adapter")
    assert _adapter_at("some/folder") == ("folder", Path("some/folder"))


Change = Callable[[Path], Any]


def config(**values: Any) -> Change:
    return lambda folder: edit_json(folder / "adapter_config.json", **values)


def weights(change: Callable[[dict[str, Any]], Any]) -> Change:
    def apply(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return apply


def first(tensors: dict[str, Any]) -> str:
    return next(name for name in tensors if "lora_B" in name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (config(use_dora=True), "dora scales the base's own weights"),
        (config(modules_to_save=["lm_head"]), "modules that were trained whole"),
        (config(trainable_token_indices=[3]), "changes tokens of the embedding"),
        (config(peft_type="LOHA"), "an adapter of the kind LOHA"),
        (config(bias="all"), "changes biases"),
        (config(init_lora_weights="pissa_niter_16"), "initialization pissa_niter_16, which changes the base"),
        (config(r=0), "does not say the rank and alpha"),
        (config(lora_alpha=None), "does not say the rank and alpha"),
        (weights(lambda found: found.update({"base_model.model.lm_head.weight": found[first(found)].clone()})), "it holds base_"),
        (weights(lambda found: found.pop(first(found))), "has no A and B that fit"),
        (weights(lambda found: found[first(found)].fill_(float("nan"))), "not finite"),
        (weights(lambda found: found.update({first(found): found[first(found)][:-1].clone()})), "outputs, the base's has"),
        (
            weights(
                lambda found: [
                    found.update({name.replace("layers.1.", "layers.7."): found[name].clone()})
                    for name in list(found)
                    if "layers.1.mlp.up_proj" in name
                ]
            ),
            "does not compute by itself",
        ),
        (lambda folder: (folder / "adapter_config.json").unlink(), "not an adapter folder"),
        (
            lambda folder: (folder / "manifest.json").write_text(
                json.dumps({"format": "edgetune/manifest/1", "inputs": {"base": {"sha256": "0" * 64}}})
            ),
            "whose files are not those of",
        ),
    ],
)  # fmt: skip
def test_what_cannot_stay_beside_the_base(
    change: Change, message: str, tiny_model: Path, two: dict[str, Path], plain: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(two["wide"], tmp_path / "adapter"))
    change(folder)
    with pytest.raises(InputError, match=message):
        base, config = resolve(ModelSection(id=str(tiny_model))), AutoConfig.from_pretrained(tiny_model)
        adapters = read_adapters([("one", folder)], base)
        add_branches(Path(shutil.copytree(plain, tmp_path / "graph")) / "model.onnx", adapters, config)


@pytest.mark.parametrize(
    ("file", "content", "what"),
    [("chat_template.jinja", "{{ messages }}", "chat templates"), ("quantization.json", "{}", "4-bit weights")],
)
def test_adapters_that_need_different_bases(
    file: str, content: str, what: str, tiny_model: Path, two: dict[str, Path], tmp_path: Path
) -> None:
    other = Path(shutil.copytree(two["wide"], tmp_path / "other"))
    (other / file).write_text(content)
    with pytest.raises(InputError, match=f"wide and other were trained with different {what}"):
        read_adapters([("wide", two["wide"]), ("other", other)], resolve(ModelSection(id=str(tiny_model))))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": {"method": "full"}}, "method full has no adapter"),
        ({"train": {"method": "dora"}}, "dora scales the base's own weights"),
        ({"train": {"modules_to_save": ["lm_head"]}}, "lm_head is trained whole"),
        ({"train": {"quantization_aware": True}}, "one sum that is rounded"),
        ({"train": {"target_modules": ["embed_tokens"]}}, "an adapter on the embedding"),
    ],
)
def test_recipes_that_cannot_keep_their_adapter_apart(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    recipe = {"model": {"id": "x"}, "data": {"train": "x.jsonl"}, "export": {"adapters": "separate"}, **settings}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    with pytest.raises(InputError, match=message) as caught:
        recipe_file.load(str(tmp_path / "r.yaml"), [])
    assert "export.adapters" in caught.value.text()


@pytest.mark.parametrize("target", ["qnn-npu", "cuda-fp16"])
def test_targets_that_cannot_have_adapters(target: str, tiny_model: Path, two: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="adapters") as caught:
        export_model(tiny_model, tmp_path / "out", ExportSection(target=target), adapters=[str(two["wide"])])
    assert caught.value.where == "export.adapters"


def test_the_harness_scores_the_adapter_that_is_on(skills: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from edgetune import progress
    from edgetune.export.harness import Folder

    alone = Path(shutil.copytree(skills, tmp_path / "alone"))
    manifest = read_manifest(alone)
    edit_json(alone / "manifest.json", adapters={"narrow": manifest["adapters"]["narrow"]})
    scores = {}
    with progress.task("test") as bar:
        asked = [(skills, "wide"), (skills, "narrow"), (skills, None), (skills, "none"), (alone, None), (alone, "none")]
        for folder, name in asked:
            model = Folder(folder, bar, None, name)
            ((score, _),) = model._loglikelihood_tokens([(None, model.tok_encode(PROMPT), model.tok_encode(" France"))])
            scores[folder.name, name] = score
    assert len({scores["skills", name] for name in ("wide", "narrow", "none")}) == 3
    assert scores["skills", None] == scores["skills", "none"] == scores["alone", "none"]  # of several none is on
    assert scores["alone", None] == scores["skills", "narrow"]  # a single one is


def test_chat_switches_and_lists_them(skills: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with load(skills) as session:
        talk = Chat(session, Conversation(), GenerationOptions(max_tokens=2), interactive=False)
        talk.take("/adapter")
        assert "adapter: none; of wide, narrow" in capsys.readouterr().err
        talk.take("/adapter narrow")
        assert "adapter: narrow; of wide, narrow" in capsys.readouterr().err
        with pytest.raises(InputError, match="no adapter 'tidy'"):
            talk.take("/adapter tidy")
        talk.take("hello")
        talk.take("/adapter none")
        assert "adapter: none" in capsys.readouterr().err


def test_the_command_line_takes_names(skills: Path) -> None:
    good = edgetune("generate", skills, PROMPT, "--raw", "--adapter", "wide", "--max-tokens", "4", "--json")
    assert good.returncode == 0, good.stderr
    for command in (["generate", skills, "hello"], ["chat", skills], ["bench", skills]):
        bad = edgetune(*command, "--adapter", "tidy")
        assert bad.returncode == 2 and "has no adapter 'tidy': it has wide, narrow" in bad.stderr


def test_what_an_adapter_costs_is_in_the_card(tiny_model: Path, two: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "skill"
    export_model(tiny_model, out, ExportSection(target="cpu-fp32", max_length=128), adapters=[str(two["wide"])])
    short = ("--prompt-tokens", "16", "--new-tokens", "4", "--warmup", "0", "--repetitions", "2", "--loads", "0")
    done = edgetune("bench", out, *short)
    assert done.returncode == 0, done.stderr
    assert "were the adapter merged" in (out / "README.md").read_text()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".tmp")]


def test_a_foreign_adapter_that_names_another_base(
    tiny_model: Path, two: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, base = Path(shutil.copytree(two["wide"], tmp_path / "adapter")), resolve(ModelSection(id=str(tiny_model)))
    read_adapters([("one", folder)], base)
    assert "warning" not in capsys.readouterr().err
    edit_json(folder / "adapter_config.json", base_model_name_or_path="someone/Other-1B")
    read_adapters([("one", folder)], base)
    assert "warning: one was trained on someone/Other-1B" in capsys.readouterr().err
