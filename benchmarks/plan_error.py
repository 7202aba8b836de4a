"""How far `edgetune plan` is from the training that it plans: time and peak memory, said and found.

    python benchmarks/plan_error.py
    python benchmarks/plan_error.py lora full

Plans and trains each recipe (lora, qlora, dora and full when none is named) in a folder that is deleted afterwards.
About 2 minutes a recipe on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RECIPES = ("lora", "qlora", "dora", "full")


def edgetune(folder: Path, *words: str) -> str:
    """Run a command of edgetune in a folder; what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "edgetune", *words], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"edgetune {' '.join(words)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def compare(recipe: str, folder: Path) -> dict[str, Any]:
    """Plan and train a recipe in `folder`: seconds and 10^6 bytes, said and found, and tokens a second found."""
    edgetune(folder, "run", recipe, "--until", "data")
    planned = json.loads(edgetune(folder, "plan", recipe, "--json"))
    said = next(stage for stage in planned["stages"] if stage["name"] == "train")
    edgetune(folder, "run", recipe, "--until", "train")
    found = json.loads((Path(planned["run"]) / "train" / "report.json").read_text(encoding="utf-8"))
    return {
        "said_s": said["seconds"],
        "found_s": found["seconds_in_all"],
        "said_mb": said["memory_mb"],
        "found_mb": found["peak_rss_mb"],
        "tokens_per_s": found["tokens_per_s"],
    }


def main() -> None:
    """Compare each recipe and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("recipes", nargs="*", default=RECIPES, help=f"default: {', '.join(RECIPES)}")
    print("| recipe | time said | found | error | memory said | found | error | tokens/s |")
    print("|---|---|---|---|---|---|---|---|")
    for recipe in parser.parse_args().recipes:
        with tempfile.TemporaryDirectory() as folder:
            one = compare(recipe, Path(folder))
        print(
            f"| {recipe} | {one['said_s']:.0f} s | {one['found_s']:.0f} s | {one['said_s'] / one['found_s'] - 1:+.0%} "
            f"| {one['said_mb']:,.0f} MB | {one['found_mb']:,.0f} MB | {one['said_mb'] / one['found_mb'] - 1:+.0%} "
            f"| {one['tokens_per_s']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
