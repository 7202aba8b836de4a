"""What is sure to fail in an export is refused before any work, be it training or quantization."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from edgetune.errors import InputError
from edgetune.export import builder, decoder
from edgetune.export.builder import architectures, explained, option_words
from edgetune.export.preflight import preflight, require_rows
from edgetune.export.targets import Target, load_target

Model = Callable[..., Path]


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Model:
    """A random model of any of transformers' configurations, with the tiny model's tokenizer."""

    def make(kind: str = "LlamaConfig", **changes: Any) -> Path:
        import transformers
        from transformers import AutoModelForCausalLM

        folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
        ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        sizes = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
        config = getattr(transformers, kind)(**{**ids, **sizes, **heads, **changes})
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        return folder

    return make


def look(folder: Path, target: str | Target = "cpu-int8", context: int = 256, **how: Any) -> None:
    found = load_target(target) if isinstance(target, str) else target
    preflight(folder, found, context, folder, **how)


@pytest.mark.parametrize("name", ["cpu-fp32", "cpu-int8", "cpu-int4", "cpu-auto", "cuda-int4", "dml-int4", "qnn-npu"])
@pytest.mark.parametrize("before_training", [True, False])
def test_what_is_right_passes(tiny_model: Path, name: str, before_training: bool) -> None:
    look(tiny_model, name, before_training=before_training)


def test_the_builders_architectures_are_read_from_the_installed_one() -> None:
    known = architectures()
    assert {"LlamaForCausalLM", "Qwen2ForCausalLM", "Phi3ForCausalLM"} <= known
    assert not {"Olmo2ForCausalLM", "CohereForCausalLM", "StableLmForCausalLM", "Starcoder2ForCausalLM"} & known


@pytest.mark.parametrize("text", ["config.architectures[0] in known()", "not python at all (", None])
def test_a_builder_whose_list_cannot_be_read_stops_nothing(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    class Spec:
        submodule_search_locations = (str(tmp_path / "genai"),)

    if text is not None:
        (tmp_path / "genai/models").mkdir(parents=True)
        (tmp_path / "genai/models/builder.py").write_text(text)
    monkeypatch.setattr(builder, "find_spec", lambda _: Spec())
    architectures.cache_clear()
    try:
        assert architectures() == frozenset()
        look(model("Olmo2Config"), "cpu-fp32")
    finally:
        architectures.cache_clear()
        option_words.cache_clear()


@pytest.mark.parametrize("kind", ["Olmo2Config", "CohereConfig", "StableLmConfig", "Starcoder2Config"])
def test_an_architecture_that_the_builder_does_not_know(model: Model, kind: str) -> None:
    folder = model(kind)
    for before in (True, False):
        with pytest.raises(InputError, match=r"does not know the architecture \w+ForCausalLM\n  fix: .*Llama, .*Qwen3"):
            look(folder, before_training=before)


def test_the_architecture_is_what_the_builder_will_see(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    for named, said in ((["LlamaModel"], "know the architecture LlamaModel"), (None, "names no architecture")):
        (folder / "config.json").write_text(json.dumps({**config, "architectures": named}))
        with pytest.raises(InputError, match=said):
            look(folder)
        look(folder, before_training=True)  # transformers writes the merged model's


@pytest.mark.parametrize(
    ("changes", "target", "said"),
    [
        ({"head_dim": 24}, "cpu-fp32", "heads have 24 numbers; .* multiple of 16"),
        ({"hidden_size": 72, "head_dim": 16}, "cpu-int8", "no block size divides the 72 columns of model.embed_tokens"),
        ({"intermediate_size": 100}, "cpu-int4", r"no block size divides the 100 columns of \S+\.mlp\.down_proj"),
        ({"intermediate_size": 100}, "cpu-auto", r"no block size divides the 100 columns of \S+\.mlp\.down_proj"),
    ],
)
def test_sizes_that_do_not_fit(model: Model, changes: dict[str, Any], target: str, said: str) -> None:
    folder = model(**changes)
    for before in (True, False):
        with pytest.raises(InputError, match=said):
            look(folder, target, before_training=before)
    if "head_dim" not in changes or changes["head_dim"] == 16:
        look(folder, "cpu-fp32")


def test_fixed_shapes_need_a_context_of_whole_pieces(tiny_model: Path) -> None:
    with pytest.raises(InputError, match=r"100 tokens is no multiple of the 64(.|\n)*set it to 64"):
        look(tiny_model, "qnn-npu", 100)


@pytest.mark.parametrize(
    ("before", "cure"), [(True, "model.chat_template=FILE.jinja"), (False, "a copy of it, as chat_template.jinja")]
)
def test_no_chat_template(tiny_model: Path, tmp_path: Path, before: bool, cure: str) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    template = (folder / "chat_template.jinja").rename(tmp_path / "mine.jinja")
    with pytest.raises(InputError, match="no chat template") as caught:
        look(folder, before_training=before)
    assert cure in str(caught.value.fix)
    look(folder, before_training=before, chat_template=str(template))
    shutil.copyfile(template, folder / "chat_template.jinja")
    look(folder, before_training=before)


def test_a_model_that_does_not_say_how_an_answer_ends(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    for name in ("config.json", "generation_config.json"):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({key: value for key, value in values.items() if key != "eos_token_id"}))
    with pytest.raises(InputError, match="the id of the token that ends an answer"):
        look(folder)


def test_no_fast_tokenizer(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgetune.export import preflight as module

    monkeypatch.setattr(module, "load_tokenizer", lambda *_, **__: object())  # as those that are Python only
    with pytest.raises(InputError, match=r"no fast tokenizer \(tokenizer.json\)"):
        look(tiny_model)


def test_what_the_builder_did_not_make_is_told_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "genai_config.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"made no tokenizer.json, its graph of this model\n  fix: .*fast tokenizer"):
        decoder._check_files(tmp_path / "model", tmp_path)


def test_a_tie_that_the_weights_contradict_is_told_before_training(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"tie_word_embeddings: true\), but the files hold two that differ"):
        look(folder, before_training=True)


@pytest.mark.parametrize(
    ("changes", "checked"), [({}, True), ({"provider": "cuda"}, False), ({"architecture": "arm64"}, False)]
)
def test_this_processors_kernels_are_checked_for_targets_that_run_on_it(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], checked: bool
) -> None:
    monkeypatch.setattr("edgetune.export.targets.architecture", lambda: "x86-64")
    monkeypatch.setattr("edgetune.runtime.kernels.wrong", lambda: {"int4 with zero points": 0.46})
    look(tiny_model, "cpu-int8")
    target = load_target("cpu-int4").model_copy(update=changes)
    with pytest.raises(InputError, match="wrong, by 46%") if checked else nullcontext():
        look(tiny_model, target)


def test_too_little_memory_or_disk(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgetune.export import preflight as module

    monkeypatch.setattr(module, "total_memory", lambda: 1e8)
    with pytest.raises(InputError, match="100 MB are there"):
        look(tiny_model, before_training=True)


@pytest.mark.parametrize(
    ("target", "steps", "rows", "tokens", "said"),
    [
        ("cpu-int4", 0, 0, 0, "calibrates on examples, and none are given"),
        ("cpu-int4", 0, 5, 999, "mine.jsonl: 999 tokens are too few to calibrate on"),
        ("cpu-auto", 0, 5, 999, "mine.jsonl: 999 tokens are too few to calibrate on"),
        ("qnn-npu", 0, 5, 255, "mine.jsonl: static quantization needs at least 256 tokens"),
        ("cpu-int8", 5, 7, 9999, "mine.jsonl: 7 rows of 9,999 tokens are too few to heal on"),
        ("cpu-int8", 5, 9, 999, "mine.jsonl: 9 rows of 999 tokens are too few to heal on"),
    ],
)
def test_too_few_rows(target: str, steps: int, rows: int, tokens: int, said: str) -> None:
    with pytest.raises(InputError, match=said):
        require_rows(load_target(target), steps, rows, tokens, where="mine.jsonl")


def test_enough_rows() -> None:
    require_rows(load_target("cpu-int8"), 0, 0, 0)
    require_rows(load_target("cpu-fp32"), 5, 1, 1)  # nothing is quantized, so nothing healed
    for name in ("cpu-int4", "cpu-auto", "qnn-npu"):
        require_rows(load_target(name), 5, 8, 1000)
    quantized_cache = load_target("cpu-fp32").model_copy(update={"kv_cache": "int8"})
    require_rows(quantized_cache, 0, 1, 256)
    with pytest.raises(InputError, match="int8 KV cache needs at least 256 tokens of calibration rows, not 255"):
        require_rows(quantized_cache, 0, 1, 255)


@pytest.mark.parametrize(
    ("code", "log", "exit_code", "said"),
    [
        (-9, "Reading layer 3\n", 2, "too little memory for the model builder"),
        (137, "", 2, "too little memory for the model builder"),
        (1, "Traceback\nRuntimeError: [enforce] DefaultCPUAllocator: can't allocate\n", 2, "too little memory"),
        (1, "x\nOSError: [Errno 28] No space left on device\n", 2, "the disk filled up"),
        (1, "Traceback\nNotImplementedError: The x model is not currently supported.\n", 2, "cannot export this model"),
        (1, "Traceback\n  File\nValueError: block_size must be 16\n", 1, "failed: ValueError: block_size must be 16"),
        (1, f"RuntimeError: core.cpp {'x' * 999}\n", 1, r"failed: RuntimeError: core.cpp x{200,290}\n"),
        (1, "torch.Error: a\n\nKeyError: 'b'\nSaving\n", 1, "failed: KeyError: 'b'"),
        (-11, "Reading layer 3\r", 1, r"failed: Reading layer 3 \(signal 11\)"),
        (3, "", 1, r"failed: it said nothing \(exit 3\)"),
    ],
)
def test_how_a_builder_ends_is_one_message(
    tmp_path: Path, own_home: Path, code: int, log: str, exit_code: int, said: str
) -> None:
    error = explained(code, log, load_target("cpu-fp32"), tmp_path / "artifact", "my model")
    assert error.exit_code == exit_code and "\n" not in error.what
    with pytest.raises(type(error), match=said):
        raise error
    kept = own_home / "logs/builder-my-model.log"
    assert kept.is_file() == (exit_code == 1)
    if exit_code == 1:
        assert kept.read_bytes() == log.encode() and str(kept) in str(error.fix)


@pytest.mark.parametrize(
    ("target", "changes", "said"),
    [
        ("cpu-int4", {"quantization": {"modules": {"donw_proj": {"bits": 8}}}}, "no matrix `donw_proj`.*`down_proj`"),
        ("qnn-npu", {"static": {"modules": {"lm_haed": 16}}}, "no matrix `lm_haed`.*`lm_head`"),
        ("cpu-fp32", {"options": {"prune_lm_haed": True}}, "reads no option `prune_lm_haed`.*`prune_lm_head`"),
        ("cpu-fp32", {"options": {"foo_bar": 1}}, "reads no option `foo_bar`"),
    ],
)
def test_names_in_a_target_that_mean_nothing(tiny_model: Path, target: str, changes: dict[str, Any], said: str) -> None:
    option_words.cache_clear()
    found = load_target(target).model_dump()
    for key, values in changes.items():
        found[key] = {**(found[key] or {}), **values}
    with pytest.raises(InputError, match=f"(?s){said}"):
        look(tiny_model, Target.model_validate(found))


def test_names_in_a_target_that_mean_something(tiny_model: Path) -> None:
    found = load_target("cpu-int4").model_dump()
    found["quantization"]["modules"] = {"model.layers.1.mlp.down_proj": {"bits": 8}, "lm_head": {"bits": 8}}
    found["options"] = {"accuracy_level": 4, "prune_lm_head": True}
    look(tiny_model, Target.model_validate(found))


def test_room_is_looked_at_before_files_are_hashed(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgetune import models
    from edgetune.recipe import ExportSection
    from edgetune.standalone import export_model

    monkeypatch.setattr("edgetune.export.needs.available_memory", lambda: 1e8)
    monkeypatch.setattr(models, "resolve", lambda *_: pytest.fail("it was hashed"))
    with pytest.raises(InputError, match="100 MB are there"):
        export_model(tiny_model, tmp_path / "out", ExportSection(target="cpu-fp32"))
