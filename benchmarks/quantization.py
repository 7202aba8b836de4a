"""Compare edgetune's quantization with every option of ONNX Runtime GenAI's model builder that loads.

    python benchmarks/quantization.py MERGED --train TRAIN --validation VALIDATION [--work FOLDER] [--rounds 3]
    python benchmarks/quantization.py ../shared/models/stories15M-phi3 [--work FOLDER] [--rounds 3]

Without files of rows the model writes its own (`own_samples.py`); without the model's folder nothing is done.

Each artifact is made in a process of its own, whose memory (its own and that of the builder, added up, every tenth of a
second) is watched; compared with the merged model on the held-out rows by `edgetune verify`; then measured by `edgetune
bench`, all of them in turn, round after round. Artifacts and answers are kept in the work folder: run again, only what is
missing is done. table.md, points.json (which `export.auto.points` reads) and plot.png are written there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import own_samples
import yaml

from edgetune.models import context_length
from edgetune.models.check import check_safetensors, weight_files

BUILDER: dict[str, tuple[str, dict[str, Any]]] = {
    "builder int4": ("int4", {}),
    "builder int4, block 16": ("int4", {"block_size": 16}),
    "builder int4, block 64": ("int4", {"block_size": 64}),
    "builder int4, block 128": ("int4", {"block_size": 128}),
    "builder int4, asymmetric": ("int4", {"is_symmetric": "false"}),
    "builder int4, last int8": ("int4", {"matmul_mixed_precision": "last_matmul:int8"}),
    "builder int4 rtn": ("int4", {"algo_config": "rtn"}),
    "builder int4 rtn_last": ("int4", {"algo_config": "rtn_last"}),
    "builder int4 k_quant": ("int4", {"algo_config": "k_quant"}),
    "builder int4 k_quant_last": ("int4", {"algo_config": "k_quant_last"}),
    "builder int4 k_quant_mixed": ("int4", {"algo_config": "k_quant_mixed"}),
    "builder int4 k_quant_mixed, asymmetric": ("int4", {"algo_config": "k_quant_mixed", "is_symmetric": "false"}),
    "builder int8": ("int8", {}),
}
GPTQ = {"method": "gptq", "bits": 4, "block_size": 32, "zero_points": True}


def _int8(*modules: str) -> dict[str, Any]:
    """4 bits, and 8 in these matrices."""
    return {**GPTQ, "modules": {name: {"bits": 8, "block_size": 64} for name in modules}}


ENDS = {  # 4.6 bits a weight where embedding and head are most of a model
    **GPTQ,
    "calibration_tokens": 60_000,
    "modules": {
        "v_proj": {"bits": 8},
        "embed_tokens": {"bits": 4, "zero_points": False},
        "lm_head": {"bits": 4, "zero_points": False},
    },
}
OURS: dict[str, tuple[Any, int]] = {  # a target's name or its quantization, and steps of healing
    "edgetune int4 everywhere": (GPTQ, 0),
    "edgetune int4 everywhere, healed": (GPTQ, 100),
    "edgetune int4, v int8, ends without zero points": (ENDS, 0),
    "edgetune int4, v int8, ends without zero points, healed": (ENDS, 300),
    "edgetune int4, v int8": (_int8("v_proj"), 0),
    "edgetune int4, v int8, healed": (_int8("v_proj"), 100),
    "edgetune int4, k v o down int8": (_int8("k_proj", "v_proj", "o_proj", "down_proj"), 0),
    "edgetune int4, k v o down head int8": (_int8("k_proj", "v_proj", "o_proj", "down_proj", "lm_head"), 0),
    "edgetune cpu-int4": ("cpu-int4", 0),
    "edgetune cpu-int4, healed": ("cpu-int4", 100),
    "edgetune cpu-int8": ("cpu-int8", 0),
}
COLUMNS = (
    ("size_mb", "MB", "{:.1f}"),
    ("bits", "bits a weight", "{:.2f}"),
    ("kld_mean", "KL mean", "{:.4f}"),
    ("kld_p99", "KL p99", "{:.3f}"),
    ("top1", "top-1", "{:.1%}"),
    ("perplexity_ratio", "perplexity", "{:.3f}"),
    ("prefill_tokens_per_s", "prefill tokens/s", "{:,.0f}"),
    ("decode_tokens_per_s", "decode tokens/s", "{:.1f}"),
    ("rss_mb", "MB running", "{:,.0f}"),
    ("export_mb", "MB exporting", "{:,.0f}"),
    ("export_s", "s exporting", "{:,.0f}"),
)
_EXPORT = """
import json, sys
from pathlib import Path
from edgetune.recipe import ExportSection
from edgetune.standalone import export_model
job = json.loads(sys.argv[1])
section = ExportSection(target=job["target"], heal={"steps": job["steps"]})
export_model(Path(job["merged"]), Path(job["out"]), section, None, job["train"] and Path(job["train"]))
"""


def _tree_mb(process: int) -> float:
    """Resident memory of a process and all below it, in MB."""
    found, waiting = 0, [process]
    page = os.sysconf("SC_PAGE_SIZE")
    while waiting:
        one = waiting.pop()
        try:
            found += int(Path(f"/proc/{one}/statm").read_text().split()[1]) * page
            for task in Path(f"/proc/{one}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except OSError:
            continue
    return found / 1e6


def make(name: str, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Export once, and say what it took or why it failed."""
    started, peak = time.monotonic(), 0.0
    with (folder / "export.log").open("wb") as log:
        child = subprocess.Popen([sys.executable, "-c", _EXPORT, json.dumps(job)], stdout=log, stderr=log)
        while child.poll() is None:
            peak = max(peak, _tree_mb(child.pid))
            time.sleep(0.1)
    if child.returncode:
        lines = (folder / "export.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        told = [line for line in lines if "Error:" in line] or lines[-1:]
        return {"name": name, "failed": told[-1].strip()[:200]}
    size = sum(path.stat().st_size for path in (folder / "artifact").iterdir()) / 1e6
    bits = 8 * (folder / "artifact" / "model.onnx.data").stat().st_size / _parameters(Path(job["merged"]))
    return {"name": name, "size_mb": size, "bits": bits, "export_s": time.monotonic() - started, "export_mb": peak}


def _parameters(model: Path) -> int:
    """Numbers in a model's weights."""
    shapes = (one["shape"] for file in weight_files(model) for one in check_safetensors(file).values())
    return sum(math.prod(shape) for shape in shapes)


def _edgetune(*words: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", "edgetune", *words, "--json"], capture_output=True, text=True)
    if done.returncode not in (0, 3) or not done.stdout.strip():  # 3: the gate is not passed, the numbers are there
        raise RuntimeError(f"edgetune {words[0]}: {done.stderr.strip()[-400:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def judge(point: dict[str, Any], artifact: Path, args: argparse.Namespace) -> None:
    """Compare with the merged model."""
    wanted = ["verify", str(artifact), "--against", str(args.merged), "--data", str(args.validation)]
    found = _edgetune(*wanted, "--rows", str(args.rows))
    point |= {name: found[name] for name in ("kld_mean", "kld_p99", "tokens")}
    point |= {"top1": found["top1_agreement"], "perplexity_ratio": found["perplexity"]["ratio"]}


def time_all(points: list[dict[str, Any]], work: Path, rounds: int, context: int) -> None:
    """Measure speed and memory, all artifacts in turn: 256 + 128 tokens, or what fits the context."""
    prompt = min(256, context * 2 // 3 - 8)
    samples: dict[str, list[dict[str, Any]]] = {point["name"]: [] for point in points}
    for _ in range(rounds):
        for point in points:
            artifact = work / _slug(point["name"]) / "artifact"
            lengths = [
                "--prompt-tokens",
                str(prompt),
                "--new-tokens",
                str(prompt // 2),
                "--warmup",
                "1",
                "--repetitions",
                "3",
            ]
            samples[point["name"]].append(_edgetune("bench", str(artifact), *lengths))
    for point in points:
        own = samples[point["name"]]
        for speed in ("prefill_tokens_per_s", "decode_tokens_per_s"):
            point[speed] = statistics.median(one[speed]["p50"] for one in own)
        point["rss_mb"] = statistics.median(one["peak_rss_mb"] for one in own)
        point["rounds"] = rounds


def _slug(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-")


def table(points: list[dict[str, Any]]) -> str:
    """Markdown, smallest first; what does not load comes last."""
    lines = ["| | " + " | ".join(title for _, title, _ in COLUMNS) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    for point in sorted(points, key=lambda one: one.get("size_mb", 1e9)):
        if "failed" in point:
            lines.append(f"| {point['name']} | does not load: {point['failed'].replace('|', '/')} |")
            continue
        cells = [form.format(point[key]) if key in point else "" for key, _, form in COLUMNS]
        lines.append(f"| {point['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(points: list[dict[str, Any]], path: Path) -> None:
    """KL over size and over both speeds."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    axes = (
        ("size_mb", "size, MB"),
        ("decode_tokens_per_s", "decode, tokens/s"),
        ("prefill_tokens_per_s", "prefill, tokens/s"),
    )
    figure, places = plt.subplots(1, 3, figsize=(15, 5), sharey=True, layout="constrained")
    for (key, title), place in zip(axes, places, strict=True):
        for ours, color, label in ((True, "tab:blue", "edgetune"), (False, "tab:gray", "model builder")):
            some = [one for one in points if key in one and one["name"].startswith("edgetune") == ours]
            place.scatter([one[key] for one in some], [one["kld_mean"] for one in some], color=color, label=label)
            for one in some:
                text = one["name"].removeprefix("builder ").removeprefix("edgetune ")
                place.annotate(text, (one[key], one["kld_mean"]), fontsize=7, xytext=(4, 3), textcoords="offset points")
        place.set(xlabel=title, yscale="log")
        place.grid(alpha=0.3)
    places[0].set_ylabel("KL divergence from the merged model, nats")
    places[0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Make, judge and time each artifact; what lies there from before is not done again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("merged", type=Path)
    parser.add_argument("--train", type=Path)
    parser.add_argument("--validation", type=Path)
    parser.add_argument("--work", type=Path, default=Path("quantization"))
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="names in which this regular expression is found")
    parser.add_argument("--no-speed", action="store_true")
    args = parser.parse_args()
    if not args.merged.is_dir():
        print(f"skipped: there is no {args.merged}")
        return
    if not (args.train and args.validation):
        args.train, args.validation = args.work / "rows/train.jsonl", args.work / "rows/validation.jsonl"
        if not args.validation.is_file():
            own_samples.write(args.merged, args.work / "rows")
    points = []
    for name, (what, more) in {**BUILDER, **OURS}.items():
        if not re.search(args.only, name):
            continue
        folder = args.work / _slug(name)
        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / "point.json"
        if not kept.is_file():
            target: Any = what
            if not isinstance(what, str) or name in BUILDER:
                body = {"quantization": what, "precision": "int4", "options": {"prune_lm_head": True}}
                body = body if name in OURS else {"precision": what, "options": more}
                target = str(folder / "target.yaml")
                text = {"description": name, "needs": "a CPU", "provider": "cpu", **body}
                Path(target).write_text(yaml.safe_dump(text), encoding="utf-8")
            job = {
                "merged": str(args.merged),
                "out": str(folder / "artifact"),
                "train": str(args.train),
                "target": target,
                "steps": more if name in OURS else 0,
            }
            point = make(name, job, folder)
            if "failed" not in point:
                judge(point, folder / "artifact", args)
            kept.write_text(json.dumps(point, indent=1), encoding="utf-8")
        points.append(json.loads(kept.read_text(encoding="utf-8")))
        print(table(points[-1:]).splitlines()[-1], flush=True)
    if not args.no_speed:
        time_all(
            [point for point in points if "failed" not in point], args.work, args.rounds, context_length(args.merged)
        )
    (args.work / "points.json").write_text(json.dumps(points, indent=1), encoding="utf-8")
    (args.work / "table.md").write_text(table(points), encoding="utf-8")
    if loaded := [point for point in points if "failed" not in point]:
        plot(loaded, args.work / "plot.png")
    print(table(points))


if __name__ == "__main__":
    main()
