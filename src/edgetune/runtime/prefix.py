"""Reading prompts: in pieces, and only what is not known from the prompt before.

Kernels that round whole inputs (DynamicQuantizeMatMul has one scale for all rows of a call) give a position other bits
when it is read together with other ones, or alone as an answer's tokens are. So prompts are always cut at the same
places, multiples of a piece's length from the start, and whole pieces are what is reused: what follows then is
bit for bit what a fresh start gives. What an answer's tokens left behind is reused only where `reuse: fast` allows it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.runtime.artifact import Artifact, load_adapters
from edgetune.runtime.guidance import Guide, require_guidance
from edgetune.runtime.native import native

OnPrefill = Callable[[int, int], None]
_STEP = 128  # capacities are multiples of this many tokens, so that a somewhat longer prompt finds room
FAILED = "the generation failed"


@dataclass
class Context:
    """A native generator and what it has read.

    Attributes:
        generator: the native one.
        key: what it was made for, apart from its size: the constraint and the adapter.
        capacity: tokens that it has room for.
        ids: tokens that it has read.
        whole: how many of them, from the start, were read in whole pieces.
        cached: how many tokens of the last prompt were not read again.
    """

    generator: Any
    key: Any
    capacity: int
    ids: list[int] = field(default_factory=list)
    whole: int = 0
    cached: int = 0


class Reader:
    """Reads prompts. Keeps the last context, whose memory is that of its KV cache; one thread at a time.

    Args:
        og: the module onnxruntime_genai.
        model: its model.
        artifact: what the model was loaded from.
        piece: tokens of a prompt that are read at once; as the artifact has it when None.

    Attributes:
        piece: the same.
        fixed: the graph's shapes are fixed, which leaves its KV cache as it was made.
    """

    def __init__(self, og: Any, model: Any, artifact: Artifact, piece: int | None = None) -> None:
        self.piece = piece or artifact.prefill_tokens
        self._og, self._model, self._artifact = og, model, artifact
        # Graphs of fixed shapes write a whole KV cache, whatever is asked for: a smaller one would be overrun.
        self.fixed = "sliding_window" in artifact.config["model"]["decoder"]
        with native("ONNX Runtime cannot load the adapters", artifact):
            self._adapters = load_adapters(og, model, artifact)
        self._guidance_works = False
        self._kept: Context | None = None

    def forget(self) -> None:
        """Free the kept context."""
        self._kept = None

    def keep(self, context: Context) -> None:
        """Keep a context for the next prompt; only where its `ids` are right."""
        if not self.fixed:
            self._kept = context

    def begin(self, ids: list[int], limit: int, guide: Guide | None, reuse: str, adapter: str | None = None) -> Context:
        """A context for a prompt and an answer: a new one, or the kept one, cut back to what begins both.

        Args:
            ids: the prompt's tokens.
            limit: most tokens of the answer.
            guide: the constraint.
            reuse: see GenerationOptions.
            adapter: the name of the one that is on.

        Raises:
            InputError: the constraint cannot be followed.
            EdgetuneError: the runtime failed.
        """
        kept, self._kept = self._kept, None
        key, need = (guide and guide.key, adapter), len(ids) + limit
        if kept is not None and kept.key == key and reuse != "off":
            known = self._known(kept, ids, reuse)
            if kept.capacity >= need and self._rewound(kept, known):
                return Context(kept.generator, key, kept.capacity, ids[:known], min(kept.whole, known), known)
            if known:  # the conversation outgrew its context: it will grow on, so it gets more room
                need = max(need, 2 * kept.capacity)
        kept = None  # frees its memory before more is taken
        capacity = self._artifact.max_length
        if not self.fixed:
            capacity = min(-(-need // _STEP) * _STEP, capacity)
        generator = self._generator(capacity, guide)
        if adapter is not None:
            with native(FAILED, self._artifact):
                generator.set_active_adapter(self._adapters, adapter)
        return Context(generator, key, capacity)

    def _rewound(self, kept: Context, known: int) -> bool:
        try:
            kept.generator.rewind_to(known)
        except RuntimeError:  # not every provider can
            return False
        return True

    def read(
        self, context: Context, ids: list[int], cancel: threading.Event, on_prefill: OnPrefill | None = None
    ) -> None:
        """Read what a context does not know of a prompt, a piece at a time, until it is cancelled."""
        for _ in self._pieces(context, ids, self.piece, cancel, on_prefill):
            pass

    def logits(
        self, context: Context, ids: list[int], cancel: threading.Event, on_prefill: OnPrefill | None = None
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """`read` that gives the logits on the way.

        Returns:
            An iterator over pieces: the place of the first position, and the logits (positions, vocabulary) of it and
            the following ones.
        """
        size = 1 if self._artifact.last_logits_only else self.piece
        for start in self._pieces(context, ids, size, cancel, on_prefill):
            with native(FAILED, self._artifact):
                yield start, np.asarray(context.generator.get_output("logits")[0], np.float32)

    def _pieces(
        self, context: Context, ids: list[int], size: int, cancel: threading.Event, on_prefill: OnPrefill | None
    ) -> Iterator[int]:
        while (start := len(context.ids)) < len(ids) and not cancel.is_set():
            end = min(start // size * size + size, len(ids))
            with native(FAILED, self._artifact):
                context.generator.append_tokens(ids[start:end])
            context.ids += ids[start:end]
            if context.whole == start and end - start == self.piece:
                context.whole = end
            if on_prefill:
                on_prefill(end, len(ids))
            yield start

    def _known(self, kept: Context, ids: list[int], reuse: str) -> int:
        """How many tokens need not be read again."""
        most = min(len(kept.ids), len(ids) - 1)  # the last token is read in any case: its logits are needed
        common = next((i for i in range(most) if kept.ids[i] != ids[i]), most)
        size = self.piece
        return common if reuse == "fast" else min(common, kept.whole) // size * size

    def _generator(self, capacity: int, guide: Guide | None) -> Any:
        with native(FAILED, self._artifact):
            params = self._og.GeneratorParams(self._model)
            params.set_search_options(max_length=capacity, do_sample=False, repetition_penalty=1.0, min_length=0)
        if guide is None:
            with native(FAILED, self._artifact):
                return self._og.Generator(self._model, params)
        if not self._guidance_works:
            require_guidance(self._og, self._model)
            self._guidance_works = True
        return guide.generator(self._og, self._model, params)
