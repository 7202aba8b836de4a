"""Loading: facts of a folder, and every way in which a folder that looks right is not."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from edgetune.errors import InputError
from edgetune.models import context_length, load_model, load_tokenizer, stop_ids


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def _edit(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text())
    content.update(values)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def _load(path: Path) -> Any:
    import torch

    return load_model(path, dtype=torch.float32)


def test_loads_quietly(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import torch

    loaded = load_model(model, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert not loaded.training
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr(), "the tie is kept"
    load_tokenizer(model)
    assert capfd.readouterr() == ("", "")


def test_facts(model: Path) -> None:
    assert context_length(model) == 512
    assert stop_ids(model) == [2]
    _edit(model / "generation_config.json", eos_token_id=[2, 0])
    assert stop_ids(model) == [2, 0]
    (model / "generation_config.json").unlink()
    assert stop_ids(model) == [2]
    _edit(model / "config.json", eos_token_id=None, max_position_embeddings=None)
    with pytest.raises(InputError, match="eos_token_id"):
        stop_ids(model)
    with pytest.raises(InputError, match="max_position_embeddings"):
        context_length(model)
    _edit(model / "config.json", n_positions=77)
    assert context_length(model) == 77


def _without(model: Path, name: str) -> None:
    from safetensors.numpy import load_file, save_file

    weights = {key: value for key, value in load_file(model / "model.safetensors").items() if name not in key}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def test_missing_weights_are_no_random_weights(model: Path) -> None:
    _without(model, "layers.1.mlp.up_proj")
    with pytest.raises(
        InputError, match=r"1 weights are missing from the files, first model.layers.1.mlp.up_proj.weight"
    ):
        _load(model)


def test_more_layers_than_weights(model: Path) -> None:
    _edit(model / "config.json", num_hidden_layers=3)
    with pytest.raises(InputError, match="weights are missing"):
        _load(model)


def test_untied_head_that_is_not_there(model: Path) -> None:
    _edit(model / "config.json", tie_word_embeddings=False)
    with pytest.raises(InputError, match=r"first lm_head\.weight"):
        _load(model)


def test_wrong_shape(model: Path) -> None:
    _edit(model / "config.json", intermediate_size=96)
    with pytest.raises(InputError, match=r"another shape(.|\n)*\[64, 128\] in the file, \[64, 96\] expected"):
        _load(model)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "no-such-thing", "architectures": None},
            "does not know the architecture `no-such-thing`",
        ),
        ({"model_type": "vit"}, "no causal language model"),
        ({"hidden_size": "wide"}, "cannot be loaded"),
        ({"hidden_act": "no-such-function"}, "cannot be loaded"),
    ],
)
def test_wrong_config(model: Path, config: dict[str, Any], message: str) -> None:
    _edit(model / "config.json", **config)
    with pytest.raises(InputError, match=message):
        _load(model)


def test_pickle_is_never_opened(model: Path) -> None:
    import torch

    (model / "model.safetensors").unlink()
    torch.save({}, model / "pytorch_model.bin")
    with pytest.raises(InputError):
        _load(model)


def test_broken_safetensors(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be loaded"):
        _load(model)


def test_broken_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text('{"model": {"type": "Strange"}}')
    with pytest.raises(InputError, match="tokenizer cannot be loaded"):
        load_tokenizer(model)


def test_template_file(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}")
    tokenizer = load_tokenizer(model, chat_template=str(file))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "<user>Hi"
    marked = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
    file.write_text(marked)
    assert load_tokenizer(model, chat_template=str(file)).chat_template == marked


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (b"ok\n{% for m in messages %}", r"template.jinja:2: not a valid Jinja template"),
        (b"{{ raise_exception('never') }}", "fails on a user message: never"),
        (b"{{ messages[3]['content'] }}", "fails on a user message"),
        (b"Hello!", "does not put out the user's message"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_bad_template(model: Path, tmp_path: Path, template: bytes, message: str) -> None:
    file = tmp_path / "template.jinja"
    file.write_bytes(template)
    with pytest.raises(InputError, match=message):
        load_tokenizer(model, chat_template=str(file))


def test_no_template_file(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such chat template file"):
        load_tokenizer(model, chat_template=str(tmp_path / "absent.jinja"))


def test_importing_is_light() -> None:
    import subprocess

    heavy = "{'torch', 'transformers', 'pydantic', 'yaml', 'numpy'}"
    code = f"import edgetune.models, edgetune.leases, sys; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("values", "said", "cure"),
    [
        ({"num_attention_heads": 0}, "a size is 0", "`num_attention_heads`"),
        ({"hidden_act": "frob"}, "does not know the `hidden_act` 'frob'", "how it is written"),
        (
            {"rope_parameters": {"rope_type": "frob", "rope_theta": 1e4}},
            "does not know the `rope_type` 'frob'",
            "how it is written",
        ),
    ],
)
def test_values_that_no_model_has(model: Path, values: dict[str, Any], said: str, cure: str) -> None:
    from edgetune.export.quantize.weights import skeleton

    _edit(model / "config.json", **values)
    with pytest.raises(InputError, match=said) as caught:
        skeleton(model)
    assert caught.value.where == str(model / "config.json") and cure in str(caught.value.fix)
