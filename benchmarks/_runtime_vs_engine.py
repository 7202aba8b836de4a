"""One engine with one model, in a process and an environment of its own, told what to do by `runtime_vs.py`.

    PYTHON _runtime_vs_engine.py JOB

JOB is JSON: `engine`, `model` (its path), `threads` (None: the engine's own choice), `context` (tokens), `logits`
(whether logits will be asked for). It answers on stdout, a line of JSON each, first with `opened`; then on each line of
stdin: `{"generate": ids, "new": N}`, `{"logits": ids, "out": FILE}`, `{"encode": text}`. It ends when stdin does. What
libraries print goes to stderr. Nothing but numpy and the engine is needed here.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

ENGINES = {
    "edgetune": "_runtime_vs_edgetune",
    "llama.cpp": "_runtime_vs_llama",
    "OpenVINO GenAI": "_runtime_vs_openvino",
}


def main() -> None:
    """Load, then do what stdin says."""
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=lines, flush=True)

    job = json.loads(sys.argv[1])
    try:
        engine = importlib.import_module(ENGINES[job["engine"]])
        start = time.perf_counter()
        library = engine.library()
        imported = time.perf_counter()
        model = engine.Model(library, job)
        loaded = time.perf_counter()
        facts = {"version": model.version, "threads": model.threads}
        say({"opened": facts, "import_s": imported - start, "load_s": loaded - imported, **memory()})
        for line in sys.stdin:
            say(_done(model, json.loads(line)))
    except Exception as error:  # noqa: BLE001 — whatever an engine raises is told to who started it
        say({"error": " ".join(f"{type(error).__name__}: {error}".split())[:600]})


def _done(model: Any, order: dict[str, Any]) -> dict[str, Any]:
    if "generate" in order:
        stamps, tokens = model.generate(order["generate"], order["new"])
        times = [(later - before) * 1e3 for before, later in itertools.pairwise(stamps)]
        return {"ttft_ms": times[0], "itl_ms": times[1:], "tokens": tokens, **memory()}
    if "logits" in order:
        import numpy as np

        np.save(order["out"], model.logits(order["logits"]))
        return {"saved": order["out"]}
    if "quantize" in order:
        return {"done": model.quantize(**order["quantize"])}
    return {"ids": model.encode(order["encode"])}


def memory() -> dict[str, float]:
    """peak_rss_mb and rss_mb of this process (10^6 bytes), and pss_mb (shared pages divided); Linux only."""
    found = {}
    for name, file, key in (
        ("peak_rss_mb", "status", "VmHWM:"),
        ("rss_mb", "status", "VmRSS:"),
        ("pss_mb", "smaps_rollup", "Pss:"),
    ):
        for line in Path(f"/proc/self/{file}").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(key):
                found[name] = round(int(line.split()[1]) * 1024 / 1e6, 1)
    return found


if __name__ == "__main__":
    main()
