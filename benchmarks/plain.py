"""Encoders and sequence-to-sequence models beside torch: rounds in turn, medians; sizes and divergences of the exports.

    python benchmarks/plain.py --encoder all-MiniLM-L6-v2 --seq2seq flan-t5-small

Each folder is exported to `cpu-fp32` and `cpu-int8`, and then reads the same rows as the torch model (float32, transformers as it
comes, inference mode, as many threads): an encoder one text at a time and 32 at a time, a sequence-to-sequence model one text at a time
with greedy answers. Texts are the user turns of `recipes/data/chat_train.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgetune.recipe import ExportSection
from edgetune.runtime import load
from edgetune.runtime.hardware import default_threads
from edgetune.standalone import export_model

ROWS = Path(__file__).parents[1] / "recipes" / "data" / "chat_train.jsonl"
TARGETS = ("cpu-fp32", "cpu-int8")


def texts(count: int, words: int) -> list[str]:
    """User turns, their first words."""
    found = []
    for line in ROWS.read_text(encoding="utf-8").splitlines():
        turns = [turn["content"] for turn in json.loads(line)["messages"] if turn["role"] == "user"]
        found += [" ".join(turn.split()[:words]) for turn in turns]
    return found[:count]


class TorchEncoder:
    """Mean-pooled vectors as sentence-transformers makes them, longest texts first."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        self._torch, self._tokenizer = torch, AutoTokenizer.from_pretrained(folder)
        self._model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    def __call__(self, given: list[str]) -> int:
        with self._torch.inference_mode():
            read = self._tokenizer(given, padding=True, truncation=True, max_length=256, return_tensors="pt")
            hidden, mask = self._model(**read).last_hidden_state, read["attention_mask"][:, :, None]
            vectors = self._torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1).numpy()
        return len(vectors)


class TorchSeq2Seq:
    """Greedy answers by transformers' `generate`."""

    def __init__(self, folder: Path, tokens: int) -> None:
        import torch
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

        self._torch, self._tokenizer = torch, AutoTokenizer.from_pretrained(folder)
        self._model, self._tokens = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval(), tokens

    def __call__(self, given: list[str]) -> int:
        made = 0
        with self._torch.inference_mode():
            for text in given:
                read = self._tokenizer(text, return_tensors="pt")
                made += (
                    self._model.generate(**read, max_new_tokens=self._tokens, do_sample=False, num_beams=1).shape[1] - 1
                )
        return made


def exported(folder: Path, out: Path) -> dict[str, Any]:
    """The artifacts, loaded, by target; prints what each export found."""
    found = {}
    for target in TARGETS:
        report = export_model(folder, out / target, ExportSection(target=target), name=folder.name)
        compared = ", ".join(f"{name} {value:.6g}" for name, value in report["compared"].items())
        print(f"{folder.name} {target}: {report['size_mb']} MB, {report['seconds']} s; {compared}", flush=True)
        found[target] = load(out / target)
    return found


def in_turn(name: str, runs: dict[str, Callable[[], int]], rounds: int, unit: str) -> None:
    """Time each, round by round in turn after one that does not count; print medians and ratios of the same rounds."""
    times: dict[str, list[float]] = {what: [] for what in runs}
    for number in range(rounds + 1):
        for what, run in runs.items():
            started = time.perf_counter()
            made = run()
            if number:
                times[what].append(made / (time.perf_counter() - started))
    base = times["torch"]
    for what, found in times.items():
        ratio = statistics.median(one / other for one, other in zip(found, base, strict=True))
        spread = f"{min(found):,.1f} to {max(found):,.1f}"
        print(f"{name} {what}: {statistics.median(found):,.1f} {unit} ({spread}), {ratio:.2f} times torch", flush=True)


def main() -> None:
    """Export, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path)
    parser.add_argument("--seq2seq", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    given = parser.parse_args()
    import torch

    torch.set_num_threads(default_threads())
    with tempfile.TemporaryDirectory(prefix="edgetune-") as folder:
        if given.encoder:
            models, plain = exported(given.encoder, Path(folder) / "encoder"), TorchEncoder(given.encoder)
            rows = texts(given.texts, 100)
            for size, what in ((1, "one at a time"), (32, "32 at a time")):
                parts = [rows[first : first + size] for first in range(0, len(rows), size)]
                runs: dict[str, Callable[[], int]] = {"torch": lambda parts=parts: sum(plain(part) for part in parts)}  # type: ignore[misc]
                for target, model in models.items():
                    runs[target] = lambda model=model, parts=parts: sum(  # type: ignore[misc]
                        len(model.encode(part, long="window")) for part in parts
                    )
                in_turn(f"{given.encoder.name}, {what}", runs, given.rounds, "texts/s")
        if given.seq2seq:
            answers, torch_answers = (
                exported(given.seq2seq, Path(folder) / "seq2seq"),
                TorchSeq2Seq(given.seq2seq, given.tokens),
            )
            asked = [f"summarize: {text}" for text in texts(8, 80)]
            runs = {"torch": lambda: torch_answers(asked)}
            for target, model in answers.items():
                runs[target] = lambda model=model: sum(  # type: ignore[misc]
                    model.generate(text, max_tokens=given.tokens).completion_tokens for text in asked
                )
            in_turn(given.seq2seq.name, runs, given.rounds, "tokens/s")


if __name__ == "__main__":
    main()
