"""llama.cpp for `_runtime_vs_engine.py`, through the C interface that llama-cpp-python has.

Its Python class copies logits and keeps books for each token; that is left out, so that llama.cpp itself is measured.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import time
from typing import Any

import numpy as np

TYPES = {"F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q4_K_M": 15}  # llama.h: llama_ftype
_LOG: list[Any] = []  # the callback must stay alive


def library() -> Any:
    """Import it, and have it say nothing but errors."""
    import llama_cpp
    from llama_cpp import llama_cpp as c

    @c.llama_log_callback
    def quiet(level: int, text: bytes, data: Any) -> None:
        if level == 4:
            print(text.decode(errors="replace"), end="")

    _LOG.append(quiet)
    c.llama_log_set(quiet, ctypes.c_void_p(0))
    c.llama_backend_init()
    c.package_version = llama_cpp.__version__
    return c


def quantize(c: Any, source: str, out: str, kind: str) -> None:
    """Write a GGUF file anew in another type."""
    params = c.llama_model_quantize_default_params()
    params.ftype = TYPES[kind]
    if c.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama_model_quantize to {kind} failed")


class Model:
    """A GGUF file, with a context as large as the work needs."""

    def __init__(self, c: Any, job: dict[str, Any]) -> None:
        self._c = c
        self.version = c.package_version
        if job["model"] is None:  # only to quantize
            self.threads = None
            return
        self._model = c.llama_model_load_from_file(job["model"].encode(), c.llama_model_default_params())
        if not self._model:
            raise RuntimeError("llama.cpp cannot load the file")
        params = c.llama_context_default_params()
        params.n_ctx = job["context"]
        params.n_batch = job["context"]
        # llama-cpp-python's own choice is half the cores for single tokens and all of them for prompts.
        params.n_threads = job["threads"] or max(multiprocessing.cpu_count() // 2, 1)
        params.n_threads_batch = job["threads"] or multiprocessing.cpu_count()
        self._context = c.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp cannot make a context")
        self.threads = params.n_threads
        self._vocab = c.llama_model_get_vocab(self._model)
        self._sampler = c.llama_sampler_init_greedy()

    def quantize(self, source: str, out: str, kind: str) -> str:
        """See `quantize`."""
        quantize(self._c, source, out, kind)
        return out

    def generate(self, ids: list[int], new: int) -> tuple[list[float], list[int]]:
        """Greedy tokens, and the time of the start and of each of them."""
        c = self._c
        self._forget()
        prompt, one = self._array(ids), self._array([0])
        stamps, tokens = [time.perf_counter()], []
        self._decode(c.llama_batch_get_one(prompt, len(ids)))
        while True:
            tokens.append(int(c.llama_sampler_sample(self._sampler, self._context, -1)))
            stamps.append(time.perf_counter())
            if len(tokens) == new:
                return stamps, tokens
            one[0] = tokens[-1]
            self._decode(c.llama_batch_get_one(one, 1))

    def logits(self, ids: list[int]) -> np.ndarray:
        """Logits (S, V), float32, of a row of S tokens read at once."""
        c = self._c
        self._forget()
        batch = c.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for at, token in enumerate(ids):
            batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, at, 1
            batch.seq_id[at][0], batch.logits[at] = 0, 1
        try:
            self._decode(batch)
            width = c.llama_vocab_n_tokens(self._vocab)
            return np.ctypeslib.as_array(c.llama_get_logits(self._context), shape=(len(ids) * width,)).reshape(
                len(ids), width
            )
        finally:
            c.llama_batch_free(batch)

    def encode(self, text: str) -> list[int]:
        """Token ids, special tokens read as such."""
        raw = text.encode()
        found = self._array([0] * (len(raw) + 8))
        count = self._c.llama_tokenize(self._vocab, raw, len(raw), found, len(found), False, True)
        return [int(token) for token in found[:count]]

    def _forget(self) -> None:
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)

    def _decode(self, batch: Any) -> None:
        if code := self._c.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode gave {code}")

    def _array(self, ids: list[int]) -> Any:
        return (self._c.llama_token * len(ids))(*ids)
