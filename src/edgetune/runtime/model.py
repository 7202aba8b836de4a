"""A graph and its tokenizer in ONNX Runtime GenAI, under given settings. Sessions and measurements load through this."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from edgetune.errors import EdgetuneError, first_line
from edgetune.runtime import genai
from edgetune.runtime.artifact import Artifact
from edgetune.runtime.memory import trim
from edgetune.runtime.profile import Settings
from edgetune.runtime.providers import named, register_genai, require


@dataclass
class Loaded:
    """What ONNX Runtime GenAI made of an artifact: its module, the model and the tokenizer."""

    og: Any
    model: Any
    tokenizer: Any


def load_model(artifact: Artifact, settings: Settings, *, on_cpu: bool = False) -> Loaded:
    """Load an artifact.

    Args:
        artifact: a verified artifact.
        settings: threads and session options.
        on_cpu: run it on the CPU, whatever provider it was exported for.

    Raises:
        InputError: a number of threads that cannot be, or an execution provider that is missing.
        EdgetuneError: ONNX Runtime cannot load it.
    """
    options = settings.overlay()
    provider = "cpu" if on_cpu else named(artifact.config)
    if provider != "cpu":
        require(provider, artifact.name)
    og = genai()
    register_genai(og, provider)
    try:
        config = og.Config(str(artifact.path))
        if on_cpu:
            config.clear_providers()
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        model = og.Model(config)
        loaded = Loaded(og, model, og.Tokenizer(model))
    except RuntimeError as error:
        raise EdgetuneError(
            f"ONNX Runtime cannot load the artifact: {first_line(error)[:300]}",
            where=artifact.path,
            fix="export it again; `edgetune doctor` checks the installation",
        ) from error
    trim()  # reading tokenizer.json leaves 14 MB behind
    return loaded
