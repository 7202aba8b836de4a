"""edgetune's runtime beside llama.cpp and OpenVINO GenAI: the same model and machine, one interleaved run.

    python benchmarks/runtime_vs.py MERGED ARTIFACT [ARTIFACT...]
    python benchmarks/runtime_vs.py runs/quickstart/merged runs/quickstart/artifact --stress --out result
    python benchmarks/runtime_vs.py export_memory/model export_memory/edgetune/artifact --shape

Each engine is a process in an environment of its own, and works alone: llama-cpp-python (built here from source) and
openvino-genai are installed in edgetune's cache folder the first time, unless `--llama` and `--openvino` name a Python
that has them. The merged model is written as GGUF (kept in the cache folder, too) and rounded by llama.cpp; both others
read these files. All get the same token ids. How far each one's next-token distributions are from the merged model's
in float32 is measured on held-out rows, as edgetune's gate does it, so that the table shows speed at what cost.

`--shape` is for a large model's shape with random weights, as `export_memory.py` makes them: no divergence, llama.cpp alone,
64 + 24 tokens, 3 rounds, Q4_0, which is rounded from float16.

Prints the table and the goals; `--out` gets them as report.md, and everything that was measured as report.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from _runtime_vs_environments import llama_python, openvino_python
from _runtime_vs_gguf import describe, read_bytes, write_gguf
from _runtime_vs_process import OURS, Engine, Entry
from _runtime_vs_rounds import Measured, load_times, prompts, take_turns
from _runtime_vs_table import LLAMA, OPENVINO, text

from edgetune.errors import INTERRUPTED, EdgetuneError
from edgetune.files import digest, folder_size, home, read_json, sha256_file, write_json, write_text
from edgetune.models.check import weight_files
from edgetune.runtime.bench.traffic import weight_bytes
from edgetune.runtime.hardware import bandwidth_gb_s, cpu, default_threads, load_average, versions

HELD_OUT = Path(__file__).parent.parent / "recipes" / "data" / "chat_validation.jsonl"
_KINDS = ("Q4_0", "Q4_1", "Q4_K_M", "Q8_0")
_DEFAULTS: dict[str, tuple[Any, Any]] = {  # as it comes, and with --shape
    "kinds": (",".join(_KINDS), "Q4_0"),
    "rounds": (5, 3),
    "prompt": (256, 64),
    "tokens": (128, 24),
    "loads": (3, 1),
    "most": (32, 0),
}
_FAITHFUL = "F16"  # the type whose answers are compared with the merged model's, to check the file


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    what, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=what, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("merged", type=Path, help="the merged model: a transformers folder")
    parser.add_argument("artifacts", type=Path, nargs="+", metavar="artifact", help="exports of it")
    parser.add_argument("--llama", type=Path, metavar="PYTHON", help="a Python that has llama-cpp-python")
    parser.add_argument("--openvino", type=Path, metavar="PYTHON", help="a Python that has openvino-genai")
    parser.add_argument("--without", action="append", default=[], choices=["llama", "openvino"], help="leave one out")
    parser.add_argument("--shape", action="store_true", help="weights are random: speed alone, beside llama.cpp")
    parser.add_argument("--kinds", help=f"types of GGUF files (default: {','.join(_KINDS)})")
    parser.add_argument("--rounds", type=int, metavar="N", help="prompts that count (default: 5)")
    parser.add_argument("--prompt", type=int, metavar="N", help="tokens of a prompt (default: 256)")
    parser.add_argument("--tokens", type=int, metavar="N", help="tokens of an answer (default: 128)")
    parser.add_argument("--threads", type=int, metavar="N", help="of all engines (default: all cores)")
    parser.add_argument("--loads", type=int, metavar="N", help="times that each is loaded (default: 3)")
    parser.add_argument("--stress", action="store_true", help="also beside a busy program on each core")
    parser.add_argument("--rows", type=Path, metavar="FILE", default=HELD_OUT, help="held-out rows")
    parser.add_argument("--most", type=int, metavar="N", help="of them compared (default: 32; 0: none)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="gets report.md and report.json")
    found = parser.parse_args(given)
    for name, defaults in _DEFAULTS.items():
        if getattr(found, name) is None:
            setattr(found, name, defaults[found.shape])
    if found.shape and (found.most or "llama" in found.without or found.openvino):
        parser.error("--shape compares no rows, and with llama.cpp only")
    if min(found.rounds, found.prompt, found.loads) < 1 or found.tokens < 2:
        parser.error("--rounds, --prompt and --loads must be at least 1, --tokens 2")
    if wrong := [kind for kind in found.kinds.split(",") if kind not in _KINDS]:
        parser.error(f"there is no type {wrong[0]}; types are {', '.join(_KINDS)}")
    for path in (found.merged / "config.json", *(path / "genai_config.json" for path in found.artifacts), found.rows):
        if not path.is_file():
            parser.error(f"no such file: {path}")
    if not Path("/proc/self/smaps_rollup").is_file():
        parser.error("memory is read from /proc, which Linux has")
    return found


def main(given: Sequence[str] | None = None) -> int:
    """Measure and print. Returns the exit code."""
    args = arguments(given)
    try:
        result = measure(args)
    except EdgetuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    said = text(result)
    print(said, end="")
    if args.out:
        write_json(args.out / "report.json", result)
        write_text(args.out / "report.md", said)
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Files, divergence, rounds, loads. Returns what report.json has."""
    from tokenizers import Tokenizer

    threads = args.threads or default_threads()
    notes: list[str] = []
    llama = None if "llama" in args.without else llama_python(args.llama)
    openvino = None if args.shape or "openvino" in args.without else openvino_python(args.openvino)
    if args.shape and llama is None:
        raise EdgetuneError("there is nobody to compare with", where="llama.cpp", fix="give --llama PYTHON")
    entries, check = prepared(args, llama, openvino, threads, notes)
    quality = divergence(args, [entry for entry in entries if "its own" not in entry.name], check)
    tokenizer = Tokenizer.from_file(str(args.merged / "tokenizer.json"))

    def encode(words: str) -> list[int]:
        return list(tokenizer.encode(words, add_special_tokens=False).ids)

    asked = prompts(encode, texts(args.rows), args.prompt, args.rounds)
    before, bandwidth = load_average(), [bandwidth_gb_s()]
    busy = max(1, int(cpu()["usable_cores"])) if args.stress else 0
    found = take_turns(entries, asked, args.tokens, busy)
    bandwidth.append(bandwidth_gb_s())
    notes += [note] if (note := load_times(entries, found, args.prompt + args.tokens, args.loads)) else []
    if check and check.name in quality:
        notes.append(faithful(check.name, quality[check.name]))
    for entry in entries:
        failed = quality.get(entry.name, {}).get("failed")
        notes += [entry.note] * bool(entry.note)
        notes += [f"{entry.name}: no divergence, {failed}"] * bool(failed)
    compared = [entry["tokens"] for entry in quality.values() if "tokens" in entry]
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu(),
        "versions": versions(),
        "engines": sorted({f"{e.engine} {found[e.name].facts.get('version')}" for e in entries if found[e.name].facts}),
        "work": {
            "merged": args.merged.name if args.merged.name != "merged" else str(args.merged),
            "prompt": args.prompt,
            "new": args.tokens,
            "rounds": args.rounds,
            "threads": threads,
            "held_out": args.most,
            "shape": args.shape,
            "compared": compared[0] if compared else 0,
            "stressed": busy,
        },
        "bandwidth_gb_s": max(bandwidth),
        "load_average": {"before": before, "after": load_average()},
        "rows": [_row(entry, found[entry.name], quality) for entry in entries],
        "checked": quality.get(check.name) if check else None,
        "notes": notes,
    }


def prepared(
    args: argparse.Namespace, llama: Path | None, openvino: Path | None, threads: int, notes: list[str]
) -> tuple[list[Entry], Entry | None]:
    """The entries of the table, and the one by which the GGUF files are checked."""
    entries = [
        Entry(
            f"edgetune, {_name(path)}",
            OURS,
            sys.executable,
            str(path.absolute()),
            threads,
            folder_size(path) / 1e6,
            weight_bytes(path / _graph(path)),
        )
        for path in args.artifacts
    ]
    if not (llama or openvino):
        return entries, None
    files = gguf_files(args, llama, notes)
    faithful = files.pop(_FAITHFUL, Path())
    types = {kind: describe(file) for kind, file in files.items()}
    notes += [f"{kind}: matrices {said}." for kind, said in types.items() if said.split()[0] != kind or "," in said]
    check = None
    for engine, python in ((LLAMA, llama), (OPENVINO, openvino)):
        if not python:
            notes += [] if args.shape else [f"{engine} is left out."]
            continue
        known = files or {_FAITHFUL: faithful}
        for kind, file in known.items():
            about = (str(python.absolute()), str(file))
            sizes = (file.stat().st_size / 1e6, read_bytes(file))
            entries.append(Entry(f"{engine}, {kind}", engine, *about, threads, *sizes))
        if engine == LLAMA and args.most:
            check = Entry(f"{engine}, {_FAITHFUL}", engine, str(python.absolute()), str(faithful), threads, 0, None)
        own = max(1, int(cpu()["logical_cores"]) // 2)
        if engine == LLAMA and not args.shape and threads not in (1, own):
            first = entries[len(args.artifacts)]
            name = f"{first.name}, its own choice of {own} thread{'s' * (own > 1)}"
            entries.append(Entry(name, engine, *about[:1], first.model, None, first.size_mb, first.read_bytes))
    return entries, check


def gguf_files(args: argparse.Namespace, llama: Path | None, notes: list[str]) -> dict[str, Path]:
    """The merged model as GGUF files by type, made where they are not there yet."""
    folder = home() / "benchmarks" / f"gguf-{_digest(args.merged)[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    found = {} if args.shape else {_FAITHFUL: folder / f"{_FAITHFUL}.gguf"}
    if found and not found[_FAITHFUL].is_file():
        _say(f"writing GGUF files into {folder}")
        write_gguf(args.merged, found[_FAITHFUL], half=True)
    if llama is None:
        notes.append(f"Nobody rounds GGUF files without llama.cpp: {_FAITHFUL} is read instead.")
        return found
    wanted = {kind: folder / f"{kind}.gguf" for kind in args.kinds.split(",")}
    if missing := [kind for kind, file in wanted.items() if not file.is_file()]:
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            source = Path(temporary) / "source.gguf"
            _say(f"writing the model for llama.cpp into {folder}")
            write_gguf(args.merged, source, half=args.shape, words=not args.shape)  # of a large model half the disk
            with Engine(Entry(LLAMA, LLAMA, str(llama.absolute()), "", None, 0, None), 0) as engine:
                for kind in missing:
                    _say(f"rounding to {kind}")
                    made = Path(temporary) / f"{kind}.gguf"
                    engine.quantize(source, made, kind)
                    made.replace(wanted[kind])
    return {**found, **wanted}


def divergence(args: argparse.Namespace, entries: Sequence[Entry], check: Entry | None) -> dict[str, dict[str, Any]]:
    """Of `_runtime_vs_quality.measure`, in a process of its own. What was measured before of the same files is kept."""
    if not args.most:
        return {}
    kept = home() / "benchmarks" / f"gguf-{_digest(args.merged)[:16]}" / "divergence.json"
    known: dict[str, dict[str, Any]] = read_json(kept) if kept.is_file() else {}
    wanted = [*entries, *([check] if check else [])]
    keys = {entry.name: digest([entry.engine, _content(entry), sha256_file(args.rows), args.most]) for entry in wanted}
    missing = [entry for entry in entries if keys[entry.name] not in known]
    unchecked = check if check and keys[check.name] not in known else None
    if missing or unchecked:
        found = _diverging(args, missing, unchecked)
        known |= {keys[name]: numbers for name, numbers in found.items()}
        write_json(kept, {key: numbers for key, numbers in known.items() if "failed" not in numbers})
    return {name: known[key] for name, key in keys.items()}


def _diverging(args: argparse.Namespace, entries: Sequence[Entry], check: Entry | None) -> dict[str, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        file, answer = Path(folder) / "job.json", Path(folder) / "answer.json"
        job = {
            "merged": str(args.merged.absolute()),
            "rows": str(args.rows.absolute()),
            "most": args.most,
            "entries": [asdict(entry) for entry in entries],
            "check": asdict(check) if check else None,
            "answer": str(answer),
        }
        file.write_text(json.dumps(job), encoding="utf-8")
        script = Path(__file__).parent / "_runtime_vs_quality.py"
        if subprocess.run([sys.executable, str(script), str(file)], stdout=sys.stderr).returncode:
            raise EdgetuneError("divergence could not be measured", where=args.merged, fix="see the lines above")
        found: dict[str, dict[str, Any]] = json.loads(answer.read_text(encoding="utf-8"))
        return found


def _digest(merged: Path) -> str:
    return digest([*map(sha256_file, weight_files(merged)), sha256_file(merged / "tokenizer.json")])


def _content(entry: Entry) -> list[str]:
    """Hashes of what an entry loads, and which environment loads it."""
    path = Path(entry.model)
    files = sorted(path.glob("*.onnx*")) if path.is_dir() else [path]
    return [entry.python, *map(sha256_file, files)]


def faithful(name: str, quality: dict[str, Any]) -> str:
    """What is said of the file that nothing was rounded in but to float16."""
    if "failed" in quality:
        return f"The GGUF files could not be checked: {quality['failed']}"
    greedy = quality["greedy"]
    return (
        f"The GGUF files are the merged model: {name} has KL {quality['kld_mean']:.6f}, {greedy['same']} of "
        f"{greedy['tokens']} greedy tokens are transformers' in float32, {greedy['alike']} of {greedy['texts']} rows are "
        "cut into the same tokens."
    )


def _row(entry: Entry, measured: Measured, quality: dict[str, dict[str, Any]]) -> dict[str, Any]:
    same = entry.name.partition(", its own")[0]
    numbers = quality.get(same, {})
    about = {
        name: value for name, value in asdict(entry).items() if name not in ("python", "model", "note", "settings")
    }
    return {**about, **asdict(measured), "quality": {} if "failed" in numbers else numbers}


def texts(file: Path) -> list[str]:
    """What is said in rows of messages; nothing of a file of another form."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [message["content"] for row in rows for message in row.get("messages", [])]


def _name(artifact: Path) -> str:
    return artifact.parent.name if artifact.name == "artifact" else artifact.name


def _graph(artifact: Path) -> str:
    return str(read_json(artifact / "genai_config.json")["model"]["decoder"]["filename"])


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
