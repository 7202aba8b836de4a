"""Compute what each process holds while it trains, by method, engine and size of the model, with `edgetune plan`'s code.

    python benchmarks/memory_table.py [--processes 8] [--methods lora,dora,qlora,full] [--sizes 0.5B,7B,32B]

Nothing is downloaded: the shapes below are those of Qwen2.5's published configurations. Activations are counted on shallow
models of the same widths, so the largest shape wants some 16 GB and some minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from edgetune.estimate import held_bytes
from edgetune.models import Base
from edgetune.recipe import TrainSection
from edgetune.train.calibrate import Calibration, calibrate

SHAPES: dict[str, dict[str, Any]] = {
    "0.5B": {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "intermediate_size": 4864},
    "7B": {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "intermediate_size": 18944},
    "32B": {"hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 40, "intermediate_size": 27648},
}
MORE = {
    "0.5B": {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "7B": {"num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
    "32B": {"num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False},
}
ENGINES: dict[str, dict[str, Any] | None] = {
    "one process": None,
    "ddp": {"engine": "ddp"},
    "ZeRO-1": {"engine": "deepspeed", "zero_stage": 1},
    "ZeRO-2": {"engine": "deepspeed", "zero_stage": 2},
    "ZeRO-3": {"engine": "deepspeed", "zero_stage": 3},
    "fsdp": {"engine": "fsdp"},
}
ROW, PASS = 512, 2048  # tokens of the longest row, and of a pass
MEASURED = 64  # tokens of the passes that are run


@lru_cache
def counted(method: str, size: str) -> Calibration:
    """A shape's calibration for a method. `full` is LoRA's with all weights in float32 and trained."""
    if method == "full":
        found = counted("lora", size)
        own = found.parameters - found.trainable
        live = found.live_bytes * 4 * own / found.weight_bytes
        return dataclasses.replace(found, parameters=own, trainable=own, weight_bytes=4.0 * own, live_bytes=live)
    section = TrainSection.model_validate({"method": method, "dtype": "bfloat16"})
    with tempfile.TemporaryDirectory() as folder:
        config = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **SHAPES[size], **MORE[size]}
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        base = Base(Path(folder), size, "folder", None, None, {})
        return calibrate(section, base, MEASURED, MEASURED, False)


def main() -> None:
    """Print the table, in GB (1e9 bytes)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--methods", default="lora,dora,qlora,full")
    parser.add_argument("--sizes", default=",".join(SHAPES))
    args = parser.parse_args()
    processes, sizes = args.processes, args.sizes.split(",")
    print(f"| GB in each of {processes} processes | " + " | ".join(sizes) + " |")
    print("|---" * (1 + len(sizes)) + "|")
    for method in args.methods.split(","):
        found = {size: counted(method, size) for size in sizes}
        for name, engine in ENGINES.items():
            if method == "qlora" and name in ("ZeRO-3", "fsdp"):
                continue  # 4-bit weights cannot be divided
            section = TrainSection.model_validate({"method": method, "distributed": engine})
            cells = []
            for one in found.values():
                kept = one.twice.of(PASS, ROW)
                cells.append(f"{held_bytes(section, one, kept, processes if engine else 1) / 1e9:,.1f}")
            print(f"| {method}, {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
