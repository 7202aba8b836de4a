"""What each part of the runtime's speed brings alone: all of them, then all but one.

    python benchmarks/runtime_parts.py runs/quickstart/merged
    python benchmarks/runtime_parts.py runs/quickstart/merged --target cpu-int8 --rounds 9 --only joined

Exports the model once with everything and once without each part of the graph (weights are rounded to nearest: speed does
not hang on how), and runs them in turn, 256 prompt tokens and 64 new ones, each in a process of its own. Parts that belong to
the session are switched off on the same artifact. Last, the time to the first token of a conversation's later turn, with
what was read kept and without. Prints medians and, of each round, the ratio to everything: its median and its range.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))

from _runtime_vs_process import OURS, Entry
from _runtime_vs_rounds import prompts, take_turns
from runtime_vs import HELD_OUT, texts

from edgetune.errors import EdgetuneError
from edgetune.export.targets import load_target
from edgetune.runtime.artifact import open_artifact
from edgetune.runtime.hardware import cpu, default_threads, versions
from edgetune.runtime.session import Session


def head(target: dict[str, Any]) -> None:
    """All positions of a prompt through the head."""
    target["options"] = {**target.get("options", {}), "prune_lm_head": False}


def joined(target: dict[str, Any]) -> None:
    """A product for each of query, key and value, gate and up."""
    from edgetune.export.quantize import kernels

    kernels._parts = lambda attention, rounded: []
    kernels._last = lambda node: ""  # no gate is found


def activations(target: dict[str, Any]) -> None:
    """No 8-bit activations: 8-bit weights by MatMulNBits."""
    for grid in target["quantization"]["modules"].values():
        grid["activations"] = "float"


GRAPH: dict[str, Callable[[dict[str, Any]], None]] = {"head": head, "joined": joined, "activations": activations}
SESSION: dict[str, dict[str, Any]] = {
    "threads": {"threads": 1},
    "spinning": {"session": {"session.intra_op.allow_spinning": "0"}},
    "huge_pages": {"huge_pages": False},
}
SAYS = {
    **{name: (part.__doc__ or "").strip() for name, part in GRAPH.items()},
    "threads": "One thread.",
    "spinning": "Threads that do not spin.",
    "huge_pages": "Weights in pages of 4 kB.",
}


def export(merged: Path, name: str, part: str, out: Path) -> None:
    """Export in this process, one part switched off; `all`: none."""
    from edgetune.recipe import ExportSection
    from edgetune.standalone import export_model

    target = load_target(name).model_dump(mode="json", exclude_unset=True)
    if "quantization" in target:
        target["quantization"]["method"] = "min_max"
    if part != "all":
        GRAPH[part](target)
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(target), encoding="utf-8")
    export_model(merged, out, ExportSection(target=str(file)))


def later_turns(artifact: Path, threads: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds to the first token of a third turn whose conversation has some 300 tokens, `kept` and `anew`."""
    rows = [json.loads(line)["messages"] for line in HELD_OUT.read_text(encoding="utf-8").splitlines()]
    found: dict[str, list[float]] = {"kept": [], "anew": []}
    with Session(open_artifact(artifact), threads=threads) as session:
        for number in range(rounds):
            words = " ".join(message["content"] for message in rows[number % len(rows)])[:400]
            talk: list[Any] = [{"role": "user", "content": f"{number}. {words}"}]
            for _ in range(2):
                answer = session.generate(talk, max_tokens=24)
                talk += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": "And then?"}]
            for way in ("kept", "anew"):
                asked = talk if way == "kept" else [{"role": "user", "content": f"Anew, {number}. {words}"}, *talk[1:]]
                started = time.perf_counter()
                for _ in session.stream(asked, max_tokens=1):
                    break
                found[way].append(1e3 * (time.perf_counter() - started))
    return found


def main() -> int:
    """Export, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("merged", type=Path, help="the merged model: a transformers folder")
    parser.add_argument("--target", default="cpu-int4", help="default: cpu-int4")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", action="append", choices=[*GRAPH, *SESSION], help="leave out the others")
    parser.add_argument("--work", type=Path, help="keeps the artifacts")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        export(args.merged, args.target, args.part, args.work / args.part)
        return 0
    wanted = args.only or [*GRAPH, *SESSION]
    if not any("activations" in grid for grid in _modules(args.target).values()):
        wanted = [name for name in wanted if name != "activations"]
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for part in ("all", *(name for name in wanted if name in GRAPH)):
            if not (work / part).is_dir():
                job = [sys.executable, __file__, str(args.merged), "--target", args.target, "--part", part]
                subprocess.run([*job, "--work", str(work)], check=True, stdout=sys.stderr)
        return report(args, work, wanted)


def _modules(target: str) -> dict[str, Any]:
    section = load_target(target).quantization
    return section.model_dump(exclude_unset=True).get("modules", {}) if section else {}


def report(args: argparse.Namespace, work: Path, wanted: list[str]) -> int:
    """Run all in turn, and print the table."""
    from tokenizers import Tokenizer

    threads = default_threads()
    entries = [
        Entry(name, OURS, sys.executable, str((work / (name if name in GRAPH else "all")).absolute()), threads, 0, None,
              settings=SESSION.get(name))
        for name in ("all", *wanted)
    ]  # fmt: skip
    tokenizer = Tokenizer.from_file(str(args.merged / "tokenizer.json"))
    asked = prompts(
        lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids), texts(HELD_OUT), 256, args.rounds
    )
    found = take_turns(entries, asked, 64, 0)
    whole = found["all"]
    print(f"{args.target}, {cpu()['model']}, {threads} threads, {args.rounds} rounds, {versions('onnxruntime')}")
    print(
        "\n| without | prefill tokens/s | the part alone brings | decode tokens/s | the part alone brings | peak MB |"
    )
    print("|---|---|---|---|---|---|")
    for entry in entries:
        mine = found[entry.name]
        if mine.failed:
            raise EdgetuneError(mine.failed, where=entry.name)
        cells = [SAYS.get(entry.name, "(everything there)")]
        for ours, its in ((whole.prefill, mine.prefill), (whole.decode, mine.decode)):
            ratios = [one / other for one, other in zip(ours, its, strict=True)]
            told = f"{statistics.median(ratios):.2f} times ({min(ratios):.2f} to {max(ratios):.2f})"
            cells += [f"{statistics.median(its):.0f}", "" if mine is whole else told]
        print("| " + " | ".join([*cells, f"{mine.memory['peak_rss_mb']:.0f}"]) + " |")
    turns = later_turns(work / "all", threads, args.rounds)
    kept, anew = (statistics.median(turns[way]) for way in ("kept", "anew"))
    print(
        f"\nA conversation's third turn, to its first token: {kept:.0f} ms, read anew {anew:.0f} ms ({anew / kept:.1f} times)"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
