"""A tiny real artifact, made by the model builder from the tiny model: `from artifacts import
tiny_artifact`."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import forked
from edgetune.run import outputs

MAX_LENGTH = 256
CONVERSATIONS = [
    [{"role": "user", "content": "What is the name?"}],
    [{"role": "system", "content": "Short."}, {"role": "user", "content": "  naïve,\t東京\n\n👋🏽 12345"}],
]
_built: dict[Path, Path] = {}


@pytest.fixture(scope="session")
def tiny_artifact(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sealed float32 artifact of the tiny model with a context of 256 tokens. Read only; see `copy_of`."""
    if tiny_model not in _built:  # a fixture that several modules import is made once a module
        _built[tiny_model] = _build(tiny_model, tmp_path_factory.mktemp("artifact") / "tiny")
    return _built[tiny_model]


@pytest.fixture(autouse=True, scope="module")
def known_bandwidth() -> Iterator[None]:
    """Measuring the memory's bandwidth takes longer than the rest of a tiny benchmark."""
    from edgetune.runtime.bench import measure

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(measure, "bandwidth_gb_s", lambda: 10.0)
        yield


def copy_of(artifact: Path, folder: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(artifact, folder / "copy"))


def widen(artifact: Path, tokens: int = 512) -> None:
    """Give a copy another context, up to the tiny model's 512 tokens; to be sealed afterwards."""
    config = json.loads((artifact / "genai_config.json").read_text())
    config["search"]["max_length"] = tokens
    (artifact / "genai_config.json").write_text(json.dumps(config))


def seal(artifact: Path, **extra: Any) -> None:
    """Write the manifest of what lies in the folder now."""
    (artifact / "manifest.json").unlink(missing_ok=True)
    manifest = {
        "format": "edgetune/manifest/1",
        "stage": "export",
        "name": "tiny",
        **extra,
        "outputs": outputs(artifact),
    }
    (artifact / "manifest.json").write_text(json.dumps(manifest))


def edit_json(path: Path, **changes: Any) -> None:
    """Replace top-level keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _build(model: Path, artifact: Path) -> Path:
    from transformers import AutoTokenizer

    job = {
        "model": str(model),
        "out": str(artifact),
        "precision": "fp32",
        "provider": "cpu",
        "cache": str(artifact.parent / "cache"),
        "options": {},
    }
    with (artifact.parent / "builder.log").open("w+b") as log:
        code = forked.build(job, log).wait()
        log.seek(0)
        assert code == 0, log.read().decode()
    config = json.loads((artifact / "genai_config.json").read_text())
    config["search"]["max_length"] = MAX_LENGTH
    (artifact / "genai_config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(model)
    (artifact / "chat_template.jinja").write_text(tokenizer.chat_template)
    prompts = []
    for messages in CONVERSATIONS:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        prompts.append({"messages": messages, "text": text, "ids": ids})
    golden = {
        "format": "edgetune/golden/1",
        "stop_ids": [2],
        "prompts": prompts,
        "chat_template_sha256": hashlib.sha256(tokenizer.chat_template.encode()).hexdigest(),
    }
    (artifact / "golden.json").write_text(json.dumps(golden))
    (artifact / "README.md").write_text("# tiny\n")
    (artifact / "inference_model.json").write_text('{"Name": "tiny"}\n')
    seal(artifact)
    return artifact
