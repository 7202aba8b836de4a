"""What it costs that adapters stay apart: artifacts in turn, medians of rounds with distinct prompts.

    edgetune run quickstart && cp -r runs/quickstart/artifact merged
    edgetune run quickstart export.adapters=separate
    python benchmarks/adapters.py merged runs/quickstart/artifact:none runs/quickstart/artifact:quickstart

Each argument is an artifact, after a colon the adapter that is on (its only one when not given, `none`: the base).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from edgetune.runtime import genai
from edgetune.runtime.artifact import load_adapters, open_artifact
from edgetune.runtime.hardware import default_threads


class Measured:
    """An artifact in memory, with one adapter on or none."""

    def __init__(self, text: str) -> None:
        path, _, name = text.partition(":")
        og = genai()
        self.name, self._og = text, og
        artifact = open_artifact(Path(path))
        config = og.Config(str(artifact.path))
        threads = {"intra_op_num_threads": default_threads()}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
        self._model = og.Model(config)
        self._adapter, self._adapters = artifact.adapter(name or None), load_adapters(og, self._model, artifact)
        self._piece = artifact.prefill_tokens
        self.prefill: list[float] = []
        self.decode: list[float] = []

    def round(self, ids: list[int], new: int) -> None:
        """Read a prompt and answer it greedily."""
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(max_length=len(ids) + new, min_length=len(ids) + new, do_sample=False)
        started = time.perf_counter()
        generator: Any = self._og.Generator(self._model, params)
        if self._adapter is not None:
            generator.set_active_adapter(self._adapters, self._adapter)
        for first in range(0, len(ids), self._piece):
            generator.append_tokens(ids[first : first + self._piece])
        generator.generate_next_token()
        answered = time.perf_counter()
        for _ in range(new - 1):
            generator.generate_next_token()
        self.prefill.append(len(ids) / (answered - started))
        self.decode.append((new - 1) / (time.perf_counter() - answered))


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="+", metavar="ARTIFACT[:ADAPTER]")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=64)
    given = parser.parse_args()
    measured = [Measured(text) for text in given.artifacts]
    for number in range(given.rounds + 1):
        ids = [100 + (number * 7919 + place * 104729) % 30_000 for place in range(given.prompt)]
        for one in measured:
            one.round(ids, given.new)
    print("| | prefill tokens/s | decode tokens/s | of the first |")
    print("|---|---|---|---|")
    reference = [statistics.median(rates[1:]) for rates in (measured[0].prefill, measured[0].decode)]
    for one in measured:
        prefill, decode = (statistics.median(rates[1:]) for rates in (one.prefill, one.decode))
        shares = f"prefill {prefill / reference[0]:.2f}, decode {decode / reference[1]:.2f}"
        print(f"| {one.name} | {prefill:,.0f} | {decode:.1f} | {shares} |")


if __name__ == "__main__":
    main()
