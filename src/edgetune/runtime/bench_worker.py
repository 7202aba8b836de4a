"""The measured process, started by `bench.py`: `python -m edgetune.runtime.bench_worker JOB`, JOB as JSON.

It writes a line of JSON for every round and one at the end to stdout. What libraries print goes to stderr.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.errors import EdgetuneError, InputError, from_system_error
from edgetune.runtime.hardware import checked_threads
from edgetune.runtime.memory import peak_rss_mb
from edgetune.runtime.providers import named, register_genai, require

if TYPE_CHECKING:
    from edgetune.runtime.artifact import Artifact

_WORDS = """
a about after again air all also an and animal answer around as ask at away back be because before below
best better big bird black blue boat book both bread bring build but by call can carry change child city
clean clear close cold come cook corner count country cut day deep did do door down draw drive dry each
early earth east eat end even every eye far fast father feel few field find fire first fish five follow food
for forest four friend from full game garden give glass go gold good grass great green ground grow half hand
happy hard have hear heavy help here high hill hold home horse hot house how hundred idea if in island it
just keep kind king know land large last late laugh learn leave left letter light line listen little long
look machine make many map mark may mean milk minute moon more morning most mother mountain move much music
must name near need never new next night north now number of off often old on once one only open or order
other our out over page paper part pass people picture piece place plan plant play point put question quick
rain reach read ready red rest river road rock room round run salt same say school sea second see seed seven
ship short show side sing six sky sleep slow small snow some song soon sound south space spring stand star
start stay step still stone stop storm story street strong summer sun sure table take talk tell ten than
that the then these they thing think this those three through time to today together too town train travel
tree true try turn two under until up use very voice wait walk wall want warm watch water way weather week
well west what wheel when where which white who why wide will wind window winter with without woman wood
word work world write year yellow yes yet you young
"""
_TRIES = 1000


def main() -> None:
    """Measure what the JSON argument asks for. Exits with 0 after a result and after an explained error."""
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=lines, flush=True)

    try:
        say({"result": measure(json.loads(sys.argv[1]), say)})
    except (EdgetuneError, OSError) as found:
        error = found if isinstance(found, EdgetuneError) else from_system_error(found)
        if error is None:
            raise
        kind = "input" if isinstance(error, InputError) else "failed"
        say({"error": {"kind": kind, "what": error.what, "where": error.where, "fix": error.fix}})


def measure(job: dict[str, Any], say: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Open the artifact, load it and run the rounds.

    Args:
        job: `artifact` (a path) and the fields of BenchSection.
        say: gets `{"round": …}` after each round: `counted`, `ttft_ms`, `itl_ms`,
            `prompt_sha256`, `tokens` (the ids).

    Returns:
        What is measured once: `artifact`, `folder`, `files`, `verify_s`, `load_s`, `threads`,
        `others_busy_cores`, `peak_rss_mb`.

    Raises:
        InputError: no sound artifact, or prompt and answer do not fit into its context.
        EdgetuneError: ONNX Runtime cannot load the artifact, or ended an answer too early.
    """
    import psutil

    from edgetune.runtime import genai
    from edgetune.runtime.artifact import open_artifact

    start = time.perf_counter()
    artifact = open_artifact(Path(job["artifact"]))
    verify_s = time.perf_counter() - start
    length = job["prompt_tokens"] + job["new_tokens"]
    _fits(artifact, job["prompt_tokens"], job["new_tokens"])

    og = genai()
    process = psutil.Process()
    start = time.perf_counter()
    provider = named(artifact.config)
    if provider != "cpu":
        require(provider, artifact.name)
        register_genai(og, provider)
    config = og.Config(str(artifact.path))
    threads = checked_threads(job["threads"])
    settings = {"intra_op_num_threads": threads}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": settings}}}))
    try:
        model = og.Model(config)
        tokenizer = og.Tokenizer(model)
    except RuntimeError as error:
        raise EdgetuneError(
            f"ONNX Runtime cannot load the artifact: {' '.join(str(error).split())[:300]}",
            where=artifact.path,
            fix="export it again; `edgetune doctor` checks the installation",
        ) from error
    load_s = time.perf_counter() - start

    prompts = distinct_prompts(tokenizer.encode, job["prompt_tokens"], job["warmup"], job["repetitions"])
    params = og.GeneratorParams(model)
    # min_length, so that a stop token does not end an answer early
    params.set_search_options(max_length=length, min_length=length, do_sample=False)
    for ids in prompts[: job["warmup"]]:
        found = _round(og, model, params, ids, job["new_tokens"], artifact.prefill_tokens)
        say({"round": {"counted": False, **found}})
    began, busy = time.perf_counter(), _busy_s(process)
    for ids in prompts[job["warmup"] :]:
        found = _round(og, model, params, ids, job["new_tokens"], artifact.prefill_tokens)
        say({"round": {"counted": True, **found}})
    wall = time.perf_counter() - began
    others = (_busy_s(process) - busy) / wall if wall > 0.2 else None  # the system counts in ticks of 10 ms
    return {
        "artifact": artifact.name,
        "files": {name: entry["sha256"] for name, entry in artifact.manifest["outputs"].items()},
        "folder": str(artifact.path),
        "verify_s": round(verify_s, 3),
        "load_s": round(load_s, 3),
        "threads": threads,
        "others_busy_cores": None if others is None else max(0.0, round(others, 2)),
        "peak_rss_mb": round(peak_rss_mb(), 1),
    }


def distinct_prompts(encode: Callable[[str], Any], tokens: int, warmup: int, repetitions: int) -> list[list[int]]:
    """Prompts of exactly `tokens` ids, warm-up rounds first, no two alike, the same at every call.

    They are drawn words, cut to length. How many warm-ups there are does not change the prompts that count.

    Raises:
        InputError: so short that there are not enough different ones.
    """
    found: list[list[int]] = []
    words = _WORDS.split()
    for name in [*(f"round {n}" for n in range(repetitions)), *(f"warm-up {n}" for n in range(warmup))]:
        draw = random.Random(name)
        for _ in range(_TRIES):
            ids: list[int] = []
            text = draw.choices(words, k=tokens)
            while len(ids) < tokens:  # a tokenizer may make one token of two words
                text += draw.choices(words, k=16)
                ids = [int(token) for token in encode(" ".join(text))]
            if ids[:tokens] not in found:
                found.append(ids[:tokens])
                break
        else:
            raise InputError(
                f"there are not {warmup + repetitions} different prompts of {tokens} tokens",
                where="prompt_tokens",
                fix="take longer prompts or fewer rounds",
            )
    return found[repetitions:] + found[:repetitions]


def _fits(artifact: Artifact, prompt: int, new: int) -> None:
    if prompt + new > artifact.max_length:
        raise InputError(
            f"{prompt} prompt tokens and {new} new tokens are {prompt + new}, "
            f"the artifact's context holds {artifact.max_length}",
            where=artifact.path,
            fix="lower prompt_tokens or new_tokens, or export with a larger export.max_length",
        )


def _round(og: Any, model: Any, params: Any, ids: list[int], new: int, size: int) -> dict[str, Any]:
    """One prompt answered greedily, fed `size` tokens at a time as a session feeds it. Making the KV cache counts as well."""
    start = time.perf_counter()
    generator = og.Generator(model, params)
    for first in range(0, len(ids), size):
        generator.append_tokens(ids[first : first + size])
    generator.generate_next_token()
    stamps = [time.perf_counter()]
    for _ in range(new - 1):
        generator.generate_next_token()
        stamps.append(time.perf_counter())
    tokens = [int(token) for token in generator.get_sequence(0)][len(ids) :]
    if len(tokens) != new:
        raise EdgetuneError(f"the runtime gave {len(tokens)} tokens where {new} were asked for", where="bench")
    return {
        "ttft_ms": round((stamps[0] - start) * 1e3, 3),
        "itl_ms": [round((b - a) * 1e3, 3) for a, b in pairwise(stamps)],
        "prompt_sha256": hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
        "tokens": tokens,
    }


def _busy_s(process: Any) -> float:
    """CPU seconds that all but this process used since the machine started, other guests' included."""
    import psutil

    times = psutil.cpu_times()._asdict()
    resting = {"idle", "iowait", "guest", "guest_nice"}  # guests are part of user already
    own = process.cpu_times()
    return sum(value for name, value in times.items() if name not in resting) - own.user - own.system


if __name__ == "__main__":
    main()
