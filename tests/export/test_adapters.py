"""Adapters that stay beside the base: the graph, the files, what is refused, and switching at run time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from artifacts import tiny_artifact  # noqa: F401 - a fixture
from edgetune.errors import InputError
from edgetune.recipe import ExportSection
from edgetune.runtime import load
from edgetune.runtime.options import GenerationOptions
from edgetune.standalone import export_model, verify_artifact

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
        options = GenerationOptions(max_tokens=24)
        for name in ("wide", "none", "narrow", "wide", "narrow", "none"):  # back and forth
            assert list(session.generate(PROMPT, options, adapter=name).ids) == right[name]
        assert list(session.generate(PROMPT, options).ids) == right["none"], "of several none is on by itself"
        chosen = GenerationOptions(max_tokens=24, adapter="wide")
        assert list(session.generate(PROMPT, chosen).ids) == right["wide"]
        *_, last = session.stream(PROMPT, options, adapter="narrow")
        assert last.completion is not None and list(last.completion.ids) == right["narrow"]


def test_an_adapter_that_is_not_there_is_refused_with_those_that_are(skills: Path, tiny_artifact: Path) -> None:
    with load(skills) as session, pytest.raises(InputError, match="'tidy': it has wide, narrow"):
        session.stream(PROMPT, adapter="tidy")
    with load(tiny_artifact) as session, pytest.raises(InputError, match="it carries none"):
        session.generate(PROMPT, adapter="tidy")
