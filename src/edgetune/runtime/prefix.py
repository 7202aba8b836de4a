"""Reading prompts: in pieces, and only what is not known from the prompt before.

Kernels that round whole inputs (DynamicQuantizeMatMul has one scale for all rows of a call) give a position other bits
when it is read together with other ones, or alone as an answer's tokens are. So prompts that begin alike are cut at the same
places, and whole pieces are what is reused: what follows then is bit for bit what a fresh start gives. A piece ends with a turn of the
conversation, unless it is short, or where it has its most tokens; that hangs on its own tokens only, not on what follows. What an answer's tokens left behind is reused only where `reuse: fast` allows it.

A native generator has one constraint, one adapter, and a KV cache that cannot grow. So there is a context for each constraint
and adapter, of which a few are kept, and a conversation's is made with room for the turns to come.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgetune.runtime.artifact import Artifact, load_adapters
from edgetune.runtime.cancel import Cancel, watched
from edgetune.runtime.guidance import Guide, require_guidance
from edgetune.runtime.hardware import available_memory
from edgetune.runtime.native import native

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgetune.runtime.prompt_cache import PromptCache

OnPrefill = Callable[[int, int], None]
_STEP = 128  # capacities are multiples of this many tokens, so that a somewhat longer prompt finds room
_MOST_KEPT = 3  # contexts
_SHORT = 4  # a piece ends with a turn when it has a fourth of its most tokens: short ones cost more a token
_LEAST_BYTES = 64 << 20  # of KV cache that a conversation may have, however small the model
FAILED = "the generation failed"


@dataclass
class Context:
    """A native generator and what it has read.

    Attributes:
        generator: the native one.
        key: what it was made for, apart from its size: the constraint and the adapter.
        capacity: tokens that it has room for.
        ids: tokens that it has read.
        cuts: where the whole pieces end that they begin with.
        cached: how many tokens of the last prompt were not read again.
        once: it is not kept.
        lasting: how many of its first tokens the prompt cache keeps.
        interrupted: the generator is halted, somewhere behind `ids`.
    """

    generator: Any
    key: Any
    capacity: int
    ids: list[int] = field(default_factory=list)
    cuts: list[int] = field(default_factory=list)
    cached: int = 0
    once: bool = False
    lasting: int = 0
    interrupted: bool = False

    @contextlib.contextmanager
    def interruptible(self, cancel: Cancel) -> Iterator[None]:
        """While the block runs, `cancel` ends the native call that it is in, which then raises `capi.Interrupted`."""

        def interrupt() -> None:
            self.generator.interrupt()
            self.interrupted = True

        with watched(cancel, interrupt):
            yield


class Reader:
    """Reads prompts. One thread at a time.

    The last contexts are kept, up to three. A context's memory is that of its KV cache. That of a conversation has room for the
    artifact's whole context where it takes no more than the model's files do, and no more than a quarter of the memory that is free;
    together they take no more than twice the model's files. Those not used for longest go first.

    Args:
        og: the module onnxruntime_genai.
        model: its model.
        artifact: what the model was loaded from.
        piece: most tokens of a prompt that are read at once; as the artifact has it when None.
        cache: what was read before, on disk; `model` is then of `prompt_cache.GRAPH`.

    Attributes:
        piece: the same.
        fixed: the graph's shapes are fixed, which leaves its KV cache as it was made.
    """

    def __init__(
        self, og: Any, model: Any, artifact: Artifact, piece: int | None = None, cache: PromptCache | None = None
    ) -> None:
        self.piece = piece or artifact.prefill_tokens
        self._cache = cache
        self._og, self._model, self._artifact = og, model, artifact
        # Graphs of fixed shapes write a whole KV cache, whatever is asked for: a smaller one would be overrun.
        self.fixed = "sliding_window" in artifact.config["model"]["decoder"]
        with native("ONNX Runtime cannot load the adapters", artifact):
            self._adapters = load_adapters(og, model, artifact)
        # One buffer holds what was read, and each call writes behind it; else each call takes it over into a new one.
        self._shared = bool(artifact.config["search"].get("past_present_share_buffer"))
        self._guidance_works = False
        self._turn_ends = frozenset(artifact.stop_ids)
        self._token_bytes = _token_bytes(artifact)
        self._model_bytes = max(int(artifact.size_mb * 1e6), _LEAST_BYTES)
        self._kept: list[Context] = []  # the one used last is the last

    def forget(self) -> None:
        """Free what is kept."""
        self._kept.clear()

    def keep(self, context: Context) -> None:
        """Keep a context for prompts to come, and its first tokens on disk; only where its `ids` are right."""
        if self.fixed or context.once:
            return
        if context.interrupted:
            if not self._shared:
                return  # the call that was ended has taken the caches away already
            try:
                context.generator.resume(len(context.ids))
            except RuntimeError:  # not every provider can
                return
            context.interrupted = False
        self._kept.append(context)
        if self._cache is not None:
            cuts = [cut for cut in context.cuts if cut <= context.lasting]
            self._cache.save(context.generator, context.ids, cuts, context.key[1])

    def begin(
        self, ids: list[int], limit: int, guide: Guide | None, reuse: str, adapter: str | None = None, lasting: int = 0
    ) -> Context:
        """A context for a prompt and an answer: a new one, or one that was kept, cut back to what begins both.

        Args:
            ids: the prompt's tokens.
            limit: most tokens of the answer.
            guide: the constraint.
            reuse: see GenerationOptions; `off` makes a context of just the size that is needed, and leaves the others alone.
            adapter: the name of the one that is on.
            lasting: how many of the first tokens other prompts will begin with, for the prompt cache.

        Raises:
            InputError: the constraint cannot be followed.
            EdgetuneError: the runtime failed.
        """
        key, need, once = (guide and guide.key, adapter), len(ids) + limit, reuse == "off"
        kept = None if once else next((context for context in self._kept if context.key == key), None)
        known = 0 if kept is None else self._known(kept, ids, reuse)
        stored = None if once or self._cache is None else self._cache.find(ids, adapter, known)
        outgrown = 0
        if kept is not None:
            self._kept.remove(kept)  # it comes back when all went well
            if stored is None and kept.capacity >= need and self._rewound(kept, known):
                cuts = [cut for cut in kept.cuts if cut <= known]
                return Context(kept.generator, key, kept.capacity, ids[:known], cuts, known, lasting=lasting)
            outgrown = kept.capacity if known and kept.capacity < need else 0
            kept = None  # frees its memory before more is taken
        capacity = self._capacity(need, outgrown, room=not once and guide is None)
        self._make_way(capacity)
        generator = self._generator(capacity, guide)
        with native(FAILED, self._artifact):
            if adapter is not None:
                generator.set_active_adapter(self._adapters, adapter)
            if self._cache is not None:
                self._cache.attach(generator, stored)
        found = Context(generator, key, capacity, once=once, lasting=lasting)
        if stored is not None:
            found.ids, found.cuts, found.cached = list(stored.ids), list(stored.cuts), len(stored.ids)
        return found

    def _capacity(self, need: int, outgrown: int, room: bool) -> int:
        """Tokens that a new context has room for.

        Args:
            need: tokens that it must have room for.
            outgrown: what the one before had, which a conversation outgrew: it will grow on. 0: there was none.
            room: give it room for later turns.
        """
        most = self._artifact.max_length
        if self.fixed:
            return most
        wanted = max(need, 2 * outgrown)
        if room:
            wanted = max(wanted, min(self._model_bytes, available_memory() // 4) // self._token_bytes)
        return min(-(-wanted // _STEP) * _STEP, most)

    def _make_way(self, capacity: int) -> None:
        """Free contexts until there may be one more, of this size."""
        most = 2 * self._model_bytes // self._token_bytes - capacity
        while self._kept and (len(self._kept) >= _MOST_KEPT or sum(each.capacity for each in self._kept) > most):
            del self._kept[0]

    def _rewound(self, kept: Context, known: int) -> bool:
        try:
            kept.generator.rewind_to(known)
        except RuntimeError:  # not every provider can
            return False
        return True

    def read(self, context: Context, ids: list[int], cancel: Cancel, on_prefill: OnPrefill | None = None) -> None:
        """Read what a context does not know of a prompt, a piece at a time, until it is cancelled."""
        for _ in self._pieces(context, ids, self.piece, cancel, on_prefill):
            pass

    def logits(
        self, context: Context, ids: list[int], cancel: Cancel, on_prefill: OnPrefill | None = None
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """`read` that gives the logits on the way.

        Returns:
            An iterator over pieces: the place of the first position, and the logits (positions, vocabulary) of it and
            the following ones.
        """
        import numpy as np

        size = 1 if self._artifact.last_logits_only else self.piece
        for start in self._pieces(context, ids, size, cancel, on_prefill):
            with native(FAILED, self._artifact):
                yield start, np.asarray(context.generator.get_output("logits")[0], np.float32)

    def _pieces(
        self, context: Context, ids: list[int], size: int, cancel: Cancel, on_prefill: OnPrefill | None
    ) -> Iterator[int]:
        while (start := len(context.ids)) < len(ids) and not cancel.is_set():
            cut = self._cut(ids, start, size)
            end = min(cut, len(ids))
            with native(FAILED, self._artifact):
                context.generator.append_tokens(ids[start:end])
            context.ids += ids[start:end]
            if end == cut and size == self.piece and start == (context.cuts or [0])[-1]:
                context.cuts.append(end)
            if on_prefill:
                on_prefill(end, len(ids))
            yield start

    def _known(self, kept: Context, ids: list[int], reuse: str) -> int:
        """How many tokens need not be read again."""
        most = min(len(kept.ids), len(ids) - 1)  # the last token is read in any case: its logits are needed
        common = next((i for i in range(most) if kept.ids[i] != ids[i]), most)
        return common if reuse == "fast" else max((cut for cut in kept.cuts if cut <= common), default=0)

    def whole(self, ids: list[int]) -> int:
        """How many tokens the whole pieces have that a prompt begins with."""
        end = 0
        while (cut := self._cut(ids, end, self.piece)) <= len(ids):
            end = cut
        return end

    def _cut(self, ids: list[int], start: int, size: int) -> int:
        """Where the piece ends that begins at `start`; behind the prompt's end where that cuts it off."""
        for end in range(start + max(size // _SHORT, 1), min(start + size, len(ids) + 1)):
            if ids[end - 1] in self._turn_ends:
                return end
        return start + size

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


def _token_bytes(artifact: Artifact) -> int:
    """Bytes that a token takes in the KV cache, at most: in 32 bits."""
    decoder = artifact.config["model"]["decoder"]
    sizes = [int(decoder.get(key, 0)) for key in ("num_hidden_layers", "num_key_value_heads", "head_size")]
    return max(1, 2 * 4 * math.prod(sizes))
