"""edgetune's runtime for `_runtime_vs_engine.py`: an artifact, loaded and run as `edgetune bench` does it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any


def library() -> Any:
    """Import the runtime with what a session imports."""
    from edgetune.runtime import artifact, genai, model, profile

    genai()
    return artifact, model, profile


class Model:
    """An artifact whose hashes have been checked, with its device profile where there is one."""

    def __init__(self, modules: Any, job: dict[str, Any]) -> None:
        from edgetune import __version__

        artifact, model, profile = modules
        self._artifact = artifact.open_artifact(Path(job["model"]))
        chosen = profile.settings_for(self._artifact)
        if job["threads"] not in (None, chosen.overlay()["intra_op_num_threads"]):
            chosen = profile.Settings(job["threads"])
        if job.get("settings"):
            chosen = profile.Settings(**{"threads": job["threads"], **job["settings"]})
        self._loaded = model.load_model(self._artifact, chosen)
        self._size = chosen.prefill_tokens or self._artifact.prefill_tokens
        self.threads = chosen.overlay()["intra_op_num_threads"]
        tuned = "" if chosen == profile.Settings(chosen.threads) else ", tuned"
        self.version = f"{__version__} (onnxruntime {profile.engine()['onnxruntime']}{tuned})"

    def generate(self, ids: list[int], new: int) -> tuple[list[float], list[int]]:
        """Greedy tokens, and the time of the start and of each of them. Making the KV cache counts as reading."""
        og, model = self._loaded.og, self._loaded.model
        length = len(ids) + new
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=1)
        stamps = [time.perf_counter()]
        generator = og.Generator(model, params)
        for first in range(0, len(ids), self._size):
            generator.append_tokens(ids[first : first + self._size])
        for _ in range(new):
            generator.generate_next_token()
            stamps.append(time.perf_counter())
        return stamps, [int(token) for token in generator.get_sequence(0)][len(ids) :]

    def encode(self, text: str) -> list[int]:
        """Token ids."""
        return [int(token) for token in self._loaded.tokenizer.encode(text)]
