"""OpenVINO GenAI for `_runtime_vs_engine.py`: its pipeline on a GGUF file, with its own settings.

The pipeline gives no logits. It can write the model that it makes of a GGUF file, whose outputs are the logits of all
positions: that one is read by the same library with the same settings, beside the pipeline's own way of serving it.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np


def library() -> Any:
    """Import it."""
    import openvino
    import openvino_genai

    return openvino, openvino_genai


class Model:
    """A GGUF file in a pipeline, or for logits as a model of OpenVINO."""

    def __init__(self, modules: Any, job: dict[str, Any]) -> None:
        self._ov, self._genai = modules
        self.version = self._genai.__version__.partition("-")[0]
        options = {} if job["threads"] is None else {"INFERENCE_NUM_THREADS": job["threads"]}
        self.threads = job["threads"]
        if not job["logits"]:
            self._pipeline = self._genai.LLMPipeline(job["model"], "CPU", **options)
            return
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.gguf"
            file.symlink_to(Path(job["model"]).absolute())
            self._genai.LLMPipeline(str(file), "CPU", enable_save_ov_model=True)  # written beside the file
            compiled = self._ov.Core().compile_model(file.with_name("openvino_model.xml"), "CPU", options)
        self._request = compiled.create_infer_request()
        self.threads = compiled.get_property("INFERENCE_NUM_THREADS")

    def generate(self, ids: list[int], new: int) -> tuple[list[float], list[int]]:
        """Greedy tokens, and the time of the start and of each of them (the pipeline's own measurement)."""
        config = self._genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new, True, False
        start = time.perf_counter()
        found = self._pipeline.generate(self._ov.Tensor(np.array([ids], dtype=np.int64)), config)
        whole = time.perf_counter() - start
        raw = found.perf_metrics.raw_metrics
        first, made = raw.m_times_to_first_token[0] / 1e6, list(raw.m_new_token_times)  # µs, ms
        if len(made) != new or abs(first + (made[-1] - made[0]) / 1e3 - whole) > 0.02 + 0.05 * whole:
            raise RuntimeError(
                f"its times do not add up: {len(made)} of {new} tokens, {first} s to the first, {whole} s"
            )
        return [0.0, *(first + (at - made[0]) / 1e3 for at in made)], [int(token) for token in found.tokens[0]]

    def logits(self, ids: list[int]) -> np.ndarray:
        """Logits (S, V), float32, of a row of S tokens read at once."""
        size = len(ids)
        self._request.reset_state()
        found = self._request.infer(
            {
                "input_ids": np.array([ids], dtype=np.int64),
                "attention_mask": np.ones((1, size), dtype=np.int64),
                "position_ids": np.arange(size, dtype=np.int64)[None],
                "beam_idx": np.zeros(1, dtype=np.int32),
            }
        )
        return np.asarray(found["logits"][0], dtype=np.float32)

    def encode(self, text: str) -> list[int]:
        """Token ids."""
        found = self._pipeline.get_tokenizer().encode(text, add_special_tokens=False)
        return [int(token) for token in found.input_ids.data[0]]
