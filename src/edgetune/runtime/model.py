"""A graph and its tokenizer in ONNX Runtime GenAI, under given settings. Sessions and measurements load through this."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from edgetune.errors import EdgetuneError, first_line
from edgetune.runtime import capi as og
from edgetune.runtime import genai
from edgetune.runtime.artifact import Artifact
from edgetune.runtime.kernels import session_options
from edgetune.runtime.memory import trim, use_huge_pages
from edgetune.runtime.profile import Settings
from edgetune.runtime.providers import PROVIDERS, named, register_genai, require

_HUGE_FROM_MB = 32  # what is smaller stays in the processor's caches


@dataclass
class Loaded:
    """What ONNX Runtime GenAI made of an artifact: the module of its classes, the model and the tokenizer."""

    og: Any
    model: Any
    tokenizer: Any


def load_model(artifact: Artifact, settings: Settings, provider: str | None = None, graph: str | None = None) -> Loaded:
    """Load an artifact.

    Args:
        artifact: a verified artifact.
        settings: threads and session options.
        provider: run it on this one, by edgetune's name; on what it was exported for when None.
        graph: the name of another graph of the artifact's, with the same inputs and outputs and maybe others.

    Raises:
        InputError: a number of threads that cannot be, or an execution provider that is missing.
        EdgetuneError: ONNX Runtime cannot load it.
    """
    options = settings.overlay()
    own = named(artifact.config)
    provider = provider or own
    if provider == "cpu":
        options |= _right(artifact)
    else:
        require(provider, artifact.name)
    register_genai(genai(), provider)
    try:
        config = og.Config(str(artifact.path))
        if provider != own:
            config.clear_providers()
            if provider != "cpu":
                config.append_provider(PROVIDERS[provider].genai)
                for key, value in (PROVIDERS[provider].options or {}).items():
                    config.set_provider_option(PROVIDERS[provider].genai, key, value)
        decoder: dict[str, Any] = {"session_options": options}
        if graph:
            decoder["filename"] = graph
            options["log_severity_level"] = (
                4  # an `If` that is cancelled would be told as an error; errors are raised, too
            )
        config.overlay(json.dumps({"model": {"decoder": decoder}}))
        with ThreadPoolExecutor(1) as beside:  # the graph takes one core, the tokenizer half as long
            tokenizer = beside.submit(lambda: og.Tokenizer(og.Config(str(artifact.path))))
            model = og.Model(config)
        loaded = Loaded(og, model, tokenizer.result())
    except RuntimeError as error:
        raise EdgetuneError(
            f"ONNX Runtime cannot load the artifact: {first_line(error)[:300]}",
            where=artifact.path,
            fix="export it again; `edgetune doctor` checks the installation",
        ) from error
    trim()  # reading tokenizer.json leaves 14 MB behind
    if settings.huge_pages and artifact.size_mb >= _HUGE_FROM_MB:
        threading.Thread(target=use_huge_pages, name="huge pages", daemon=True).start()
    return loaded


def _right(artifact: Artifact) -> dict[str, str]:
    """Session options that the artifact's graph needs on this processor; a pipeline of graphs needs none."""
    name = artifact.config["model"]["decoder"].get("filename")
    return session_options(artifact.path / name) if name else {}
