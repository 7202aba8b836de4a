"""The measured process' other half: conversations through a session, as `chat` and `serve` have them."""

from __future__ import annotations

import contextlib
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.errors import InputError
from edgetune.runtime.artifact import NO_ADAPTER
from edgetune.runtime.bench import prompts
from edgetune.runtime.bench.sample import ms, sha256
from edgetune.runtime.bench.workloads import DoesNotFit, Workload
from edgetune.runtime.providers import named

if TYPE_CHECKING:
    from edgetune.runtime.artifact import Artifact


class Asked:
    """Answers through a session: template, stops, caches and guessing ahead included.

    Args:
        how: `speculation` and `exact`, as GenerationOptions has them.

    Raises:
        InputError, EdgetuneError: see `Session`.
    """

    def __init__(
        self,
        artifact: Artifact,
        provider: str,
        adapter: str | None,
        threads: int | None,
        use_profile: bool,
        how: dict[str, Any],
    ) -> None:
        from edgetune.runtime.session import Session

        if provider not in ("cpu", named(artifact.config)):
            raise InputError(
                f"chat, copy and prompts run on the CPU or on what the artifact was exported for, not on {provider}",
                where="provider",
                fix="measure ppN and tgN on it, or export the artifact for it",
            )
        self._session = Session(artifact, threads, use_profile=use_profile, on_cpu=provider == "cpu")
        self._how = {**how, "adapter": adapter or NO_ADAPTER}

    def prepare(self, work: Workload, warmup: int, repetitions: int) -> int:
        """Draw the conversations of all rounds, warm-ups first. Returns how many rounds there are.

        Of a file, each prompt is asked once in a round.

        Raises:
            DoesNotFit: the context does not hold a conversation's first prompt and a token of the answer.
        """
        self._work, self._last = work, -1
        own = None if work.file is None else prompts.read_prompts(Path(work.file))
        self._rounds = [prompts.talks(work.kind, name, own) for name in prompts.round_names(warmup, repetitions)]
        for number in range(warmup if own else 0):  # other words, which leave nothing of the file's in a cache
            self._rounds[number] = [prompts.talks("chat", f"warm-up {number}")[0][:1]]
        for part in self._rounds:
            for talk in part:
                self._check(talk[0])
        return len(self._rounds)

    def _check(self, prompt: prompts.Conversation | str) -> None:
        length, context = len(self._ids(prompt)), self._session.artifact.max_length
        if length < context:
            return
        what = f"{self._work.name} has a prompt of {length:,} tokens, the artifact's context holds {context:,}, the answer included"
        fix = "shorten it" if self._work.file else "measure another workload"
        raise DoesNotFit(
            what, where=self._work.file or "workloads", fix=f"{fix}, or export with a larger export.max_length"
        )

    def _ids(self, prompt: Any) -> list[int]:
        return self._session.encode(prompt if isinstance(prompt, str) else self._session.render(prompt))

    def round(self, number: int) -> list[dict[str, Any]]:
        """A sample for each answer. A conversation ends where the context does."""
        if self._work.kind == "file" or number == self._last:
            self._session.forget()  # the same prompts were asked just before: a file's each round, and quietly under stress
        self._last = number
        samples: list[dict[str, Any]] = []
        for talk in self._rounds[number]:
            said: prompts.Conversation = []
            for turn in talk:
                prompt = turn if isinstance(turn, str) else [*said, *turn]
                try:
                    sample, text = self._answer(prompt)
                except InputError:  # the conversation has filled the context
                    if not said:
                        raise
                    break
                samples.append(sample if self._work.kind == "copy" else {"turn": len(samples) + 1, **sample})
                if not isinstance(prompt, str):
                    said = [*prompt, {"role": "assistant", "content": text}]
        return samples

    def _answer(self, prompt: Any) -> tuple[dict[str, Any], str]:
        from edgetune.runtime.options import GenerationOptions

        session = self._session
        ids = self._ids(prompt)
        options = GenerationOptions(max_tokens=self._work.new, temperature=0, **self._how)
        read = [0.0]

        def on_prefill(done: int, of: int) -> None:
            read[0] = time.perf_counter()

        start = time.perf_counter()
        stream = session.stream(prompt, options, on_prefill=on_prefill)  # renders and encodes at once
        begun = time.perf_counter()
        stamps, tokens, done = [], [], None
        with contextlib.closing(stream):
            for piece in stream:
                # Several tokens that come together came at one time.
                stamps += [time.perf_counter()] * len(piece.ids)
                tokens += [int(id) for id in piece.ids]
                done = piece.completion
        ended = time.perf_counter()
        assert done is not None
        session.decode(tokens)
        made = time.perf_counter() - ended
        sample = {
            "tokenization_ms": ms(begun - start),
            "prefill_ms": ms(read[0] - begun),
            "sampling_ms": ms(stamps[0] - read[0]),
            "ttft_ms": ms(stamps[0] - begun),
            "itl_ms": [ms(b - a) for a, b in pairwise(stamps)],
            "detokenization_ms": ms(made),
            "e2e_ms": ms(ended - start),
            "prompt_tokens": done.prompt_tokens,
            "cached_tokens": done.cached_tokens,
            "new_tokens": len(tokens),
            "drafted_tokens": done.drafted_tokens,
            "accepted_tokens": done.accepted_tokens,
            "finish_reason": done.finish_reason,
            "prompt_sha256": sha256(ids),
            "tokens": tokens,
        }
        if self._work.kind == "copy":
            share = prompts.quoted(ids, tokens)
            sample["quoted"] = None if share is None else round(share, 4)
        return sample, done.text
