"""The measured process, started by `process.py`: `python -m edgetune.runtime.bench.worker JOB`, JOB as JSON.

It opens the artifact, says what it is, and then does what it is told on stdin, a line of JSON each: `prepare` a
workload, do a `round` of it. It answers on stdout, a line each, and ends when stdin does, so that it never outlives the
process that started it. What libraries print goes to stderr.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.errors import EdgetuneError, InputError, from_system_error
from edgetune.runtime.artifact import load_adapters
from edgetune.runtime.bench import prompts
from edgetune.runtime.bench.asked import Asked
from edgetune.runtime.bench.sample import ms, sha256
from edgetune.runtime.bench.workloads import DoesNotFit, Workload
from edgetune.runtime.memory import peak_rss_mb, reset_peak
from edgetune.runtime.profile import Settings, settings_for
from edgetune.runtime.providers import PROVIDERS, named
from edgetune.runtime.speculation import row_reader

if TYPE_CHECKING:
    from edgetune.runtime.artifact import Artifact


def main() -> None:
    """Do what the JSON argument and the lines on stdin ask for. Exits with 0 at their end and after an explained error."""
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=lines, flush=True)

    try:
        engine, facts = opened(json.loads(sys.argv[1]))
        say({"opened": facts})
        for line in sys.stdin:
            try:
                say(_done(engine, json.loads(line)))
            except DoesNotFit as found:  # another workload may
                say(_told(found, "unfit"))
    except (EdgetuneError, OSError) as found:
        error = found if isinstance(found, EdgetuneError) else from_system_error(found)
        if error is None:
            raise
        say(_told(error, "input" if isinstance(error, InputError) else "failed"))


def _told(error: EdgetuneError, kind: str) -> dict[str, Any]:
    return {"error": {"kind": kind, "what": error.what, "where": error.where, "fix": error.fix}}


def _done(engine: Drawn | Asked, order: dict[str, Any]) -> dict[str, Any]:
    if "prepare" in order:
        reset_peak()
        work = Workload(**order["prepare"])
        return {"rounds": engine.prepare(work, order["warmup"], order["repetitions"])}
    if "rows" in order:
        assert isinstance(engine, Drawn)
        return {"rows": engine.rows(order["round"], order["rows"])}
    samples = engine.round(order["round"])
    return {"samples": samples, "peak_rss_mb": round(peak_rss_mb(), 1), "pss_mb": _pss_mb()}


def opened(job: dict[str, Any]) -> tuple[Drawn | Asked, dict[str, Any]]:
    """Check the artifact and load it.

    Args:
        job: the fields of `process.Job`.

    Returns:
        What does the rounds, and `artifact`, `files`, `max_length`, `graph`, `folder`, `provider`, `adapter`,
        `speculation`, `threads`, `device_profile` (its settings, None where none is used), `verify_s`, `load_s`, `peak_rss_mb`.

    Raises:
        InputError: no sound artifact, no such adapter, or a provider that is missing.
        EdgetuneError: ONNX Runtime cannot load it.
    """
    from edgetune.runtime.artifact import open_artifact

    start = time.perf_counter()
    artifact = open_artifact(Path(job["artifact"]))
    verify_s = time.perf_counter() - start
    provider = job["provider"] or named(artifact.config)
    adapter = artifact.adapter(job["adapter"])
    if provider != "cpu" and provider not in PROVIDERS:
        raise InputError(
            f"there is no provider {provider!r}", where="provider", fix=f"take cpu, {', '.join(PROVIDERS)}"
        )
    start = time.perf_counter()
    own = provider == named(artifact.config)
    plain = Settings(job["threads"])
    chosen = settings_for(artifact, job["threads"], job["use_profile"]) if own else plain
    engine: Drawn | Asked
    if job["session"]:
        how = {name: job[name] for name in ("speculation", "exact")}
        engine = Asked(artifact, provider, adapter, job["threads"], job["use_profile"], how)
    else:
        used = replace(
            chosen,
            session={**chosen.session, **job["session_options"]},
            prefill_tokens=job["prefill_tokens"] or chosen.prefill_tokens,
            huge_pages=job["huge_pages"] and chosen.huge_pages,
        )
        engine = Drawn(artifact, provider, adapter, used)
    load_s = time.perf_counter() - start
    return engine, {
        "artifact": artifact.name,
        "files": {name: entry["sha256"] for name, entry in artifact.manifest["outputs"].items()},
        "max_length": artifact.max_length,
        "graph": artifact.config["model"]["decoder"].get("filename"),
        "folder": str(artifact.path),
        "provider": provider,
        "adapter": adapter,
        "speculation": "off" if job["exact"] else job["speculation"],
        "threads": chosen.overlay()["intra_op_num_threads"],
        "device_profile": None if chosen == plain else asdict(chosen),
        "verify_s": round(verify_s, 3),
        "load_s": round(load_s, 3),
        "peak_rss_mb": round(peak_rss_mb(), 1),
    }


class Drawn:
    """Drawn prompts on the bare generator: what the model takes, without chat template, stops and text."""

    def __init__(self, artifact: Artifact, provider: str, adapter: str | None, settings: Settings) -> None:
        from edgetune.runtime.model import load_model

        self._artifact, self._adapter = artifact, adapter
        self._size = settings.prefill_tokens or artifact.prefill_tokens
        loaded = load_model(artifact, settings, provider)
        self._og, self._model, self._tokenizer = loaded.og, loaded.model, loaded.tokenizer
        self._adapters = load_adapters(self._og, self._model, artifact)

    def prepare(self, work: Workload, warmup: int, repetitions: int) -> int:
        """Draw the prompts of all rounds, warm-ups first. Returns how many rounds there are."""
        rows, self._work = work.batch, work
        length = max(work.depth + work.prompt, 1)
        drawn = prompts.distinct_prompts(self._tokenizer.encode, length, warmup * rows, repetitions * rows)
        self._rounds = [drawn[i : i + rows] for i in range(0, len(drawn), rows)]
        # Graphs of fixed shapes write a whole KV cache, whatever is asked for.
        fixed = "sliding_window" in self._artifact.config["model"]["decoder"]
        limit = self._artifact.max_length if fixed else work.length
        self._params = self._og.GeneratorParams(self._model)
        # min_length, so that a stop token does not end an answer early
        self._params.set_search_options(max_length=limit, min_length=limit, do_sample=False, batch_size=rows)
        return len(self._rounds)

    def round(self, number: int) -> list[dict[str, Any]]:
        """One prompt (or a batch) answered greedily. Making the KV cache counts as reading where nothing stands before."""
        work, rows = self._work, self._rounds[number]
        start = time.perf_counter()
        for text, _ in rows:
            self._tokenizer.encode(text)
        tokenization = time.perf_counter() - start
        start = time.perf_counter()
        generator = self._generator(self._params)
        if work.depth or not work.prompt:
            self._feed(generator, [ids[: work.depth or 1] for _, ids in rows])
            start = time.perf_counter()
        if work.prompt:
            self._feed(generator, [ids[work.depth :] for _, ids in rows])
        read = time.perf_counter()
        generator.generate_next_token()  # the logits are there: this samples, and no more
        stamps = [time.perf_counter()]
        for _ in range(work.new - 1 if work.prompt else work.new):
            generator.generate_next_token()
            stamps.append(time.perf_counter())
        tokens = [[int(id) for id in generator.get_sequence(row)][len(ids) :] for row, (_, ids) in enumerate(rows)]
        if any(len(row) != len(stamps) for row in tokens):
            raise EdgetuneError(
                f"the runtime gave {len(tokens[0])} tokens where {len(stamps)} were asked for", where="bench"
            )
        ids = [ids for _, ids in rows]
        return [
            {
                "tokenization_ms": ms(tokenization),
                "prefill_ms": ms(read - start) if work.prompt else None,
                "sampling_ms": ms(stamps[0] - read),
                "ttft_ms": ms(stamps[0] - start) if work.prompt else None,
                "itl_ms": [ms(b - a) for a, b in pairwise(stamps)],
                "detokenization_ms": ms(self._text(tokens)),
                "prompt_tokens": work.prompt,
                "new_tokens": work.new,
                "prompt_sha256": sha256(ids[0] if len(ids) == 1 else ids),
                "tokens": tokens[0] if len(tokens) == 1 else tokens,
            }
        ]

    def _generator(self, params: Any) -> Any:
        found = self._og.Generator(self._model, params)
        if self._adapter is not None:
            found.set_active_adapter(self._adapters, self._adapter)
        return found

    def _feed(self, generator: Any, rows: list[list[int]]) -> None:
        """Read tokens, so many in a call as a session reads; a batch must be read in one."""
        if len(rows) > 1:
            import numpy as np

            generator.append_tokens(np.array(rows, dtype=np.int32))
            return
        for first in range(0, len(rows[0]), self._size):
            generator.append_tokens(rows[0][first : first + self._size])

    def rows(self, number: int, counts: list[int]) -> dict[str, Any] | None:
        """What reading several tokens at once takes, and whether it gives the tokens that reading one by one gives.

        Args:
            number: the round whose prompt begins the answer, which is as long as the workload's.
            counts: how many tokens are read at once.

        Returns:
            ms: the median for each of `counts`; of: how many next tokens were compared; differ: how many of them were
            others. None where the graph does not tell the next token of each position.
        """
        ids, new = self._rounds[number][0][1], self._work.new
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(max_length=len(ids) + new + max(counts), do_sample=False)
        generator = self._generator(params)
        self._feed(generator, [ids])
        read = row_reader(generator, self._artifact)
        if read is None:
            return None
        answer = [int(generator.get_logits().argmax())]
        while len(answer) <= new:
            answer.append(int(read(answer[-1:])[-1]))
        times: list[float] = []
        differ = of = 0
        for count in counts:
            taken = []
            generator.rewind_to(len(ids))
            for first in range(0, new - count + 1, count):
                start = time.perf_counter()
                found = read(answer[first : first + count])
                taken.append(time.perf_counter() - start)
                if count > 1:
                    differ += sum(a != b for a, b in zip(found, answer[first + 1 : first + 1 + count], strict=True))
                    of += count
            times.append(ms(statistics.median(taken)))
        return {"ms": times, "differ": differ, "of": of}

    def _text(self, tokens: list[list[int]]) -> float:
        """Seconds that it takes to make text of the tokens, one by one as a stream does."""
        start = time.perf_counter()
        for row in tokens:
            stream = self._tokenizer.create_stream()
            for token in row:
                stream.decode(token)
        return time.perf_counter() - start


def _pss_mb() -> float | None:
    """Memory of this process with shared pages divided among those who share them; Linux only."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/smaps_rollup").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("Pss:"):
                return round(int(line.split()[1]) * 1024 / 1e6, 1)
    return None


if __name__ == "__main__":
    main()
