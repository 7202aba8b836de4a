"""What contradicts config.json is refused before an export begins."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgetune.errors import InputError
from edgetune.export import decoder
from edgetune.export.quantize.weights import skeleton
from edgetune.export.source_check import check_source, check_ties
from edgetune.recipe import ExportSection
from edgetune.standalone import export_model

EMBEDDING, HEAD, UP = "model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"
Change = Callable[[dict[str, torch.Tensor]], Any]


@pytest.fixture
def changed(tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """The tiny model with some keys of its config.json set, and its tensors changed in place."""

    def make(change: Change, **config: Any) -> Path:
        folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
        return folder

    return make


def test_what_is_right_passes(changed: Callable[..., Path], tiny_model: Path) -> None:
    twice = changed(lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))  # tied, and stored twice
    for folder in (tiny_model, twice):
        model = skeleton(folder)
        check_ties(folder, model.config)
        check_source(folder, model)


@pytest.mark.parametrize(
    ("change", "config", "told"),
    [
        (lambda found: found.update({HEAD: found[EMBEDDING] + 1}), {}, "tie_word_embeddings: true.*two that differ"),
        (lambda _: None, {"tie_word_embeddings": False}, "tie_word_embeddings: false.*hold no lm_head.weight"),
        (lambda found: found.pop(UP), {}, f"lack 1 weights, first {UP}"),
        (lambda _: None, {"intermediate_size": 112}, r"has the shape \[128, 64\], by config.json it has \[112, 64\]"),
        (lambda _: None, {"num_attention_heads": 3}, "config.json cannot be used: "),
        (lambda _: None, {"model_type": "martian"}, "does not know the architecture `martian`"),
        (lambda found: found[UP].view(-1)[3:4].fill_(float("nan")), {}, f"{UP} holds numbers that are not finite"),
        (lambda found: found[UP].view(-1)[3:4].fill_(float("inf")), {}, f"{UP} holds numbers that are not finite"),
    ],
)
@pytest.mark.parametrize("target", ["cpu-int8", "cpu-fp32"])
def test_what_contradicts_is_refused_before_the_work(
    changed: Callable[..., Path],
    tmp_path: Path,
    change: Change,
    config: dict[str, Any],
    told: str,
    target: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("write_checkpoint", "build"):
        monkeypatch.setattr(decoder, name, lambda *_, **__: pytest.fail("it has begun"))
    with pytest.raises(InputError, match=told) as caught:
        export_model(changed(change, **config), tmp_path / "out", ExportSection(target=target))
    assert caught.value.exit_code == 2 and not (tmp_path / "out").exists()


def test_layers_that_config_does_not_know(changed: Callable[..., Path], tmp_path: Path) -> None:
    less = changed(lambda _: None, num_hidden_layers=1)
    with pytest.raises(InputError, match=r"says 1 layers \(num_hidden_layers\), the files hold more: model.layers.1"):
        check_source(less, skeleton(less))


def test_what_a_model_does_not_read_is_left_out(changed: Callable[..., Path], tmp_path: Path) -> None:
    more = changed(lambda found: found.update({"model.layers.5.foo.weight": torch.ones(64, 64)}))
    export_model(more, tmp_path / "out", ExportSection(target="cpu-int8", max_length=128))


def test_numbers_beyond_float16(changed: Callable[..., Path]) -> None:
    large = changed(lambda found: found[UP].view(-1)[3:4].fill_(7e4))
    check_source(large, skeleton(large))
    with pytest.raises(InputError, match=rf"{UP} holds 70000, and the target's weights go up to 65504"):
        check_source(large, skeleton(large), 65504.0)
