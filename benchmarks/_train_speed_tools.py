"""The parts of `train_speed.py` that need torch, each in a process of its own, so that no other process grows by them.

    python _train_speed_tools.py prepare|rate|loss JOB.json

The answer is written as JSON to the job's `answer`.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_SHAPES = {"1200 x 576 x 1536": (1200, 576, 1536), "4096 x 4096 x 4096": (4096, 4096, 4096)}
_RATE_SECONDS = 1.0


def choose(lengths: Sequence[int], tokens: int, longest: int, batch_size: int) -> tuple[list[int], int]:
    """Choose rows for about `tokens` tokens, so that every side learns from the same ones equally often.

    Args:
        lengths: tokens of each row.
        tokens: wanted in all.
        longest: rows over this length are left out.
        batch_size: the number of rows is a multiple of it, so that everyone takes the same number of steps.

    Returns:
        Row numbers in a drawn order, and passes over them.
    """
    order = [row for row, length in enumerate(lengths) if length <= longest]
    random.Random(42).shuffle(order)
    rows, total = 0, 0
    while rows + batch_size <= len(order) and (total < tokens or not rows):
        total += sum(lengths[row] for row in order[rows : rows + batch_size])
        rows += batch_size
    return order[:rows], max(1, round(tokens / total)) if total else 1


def prepare(job: dict[str, Any]) -> dict[str, Any]:
    """Choose rows and write them as they are (for edgetune) and as token ids with labels (for TRL and the judge).

    Returns:
        The model's folder, id and number of parameters; rows, passes, tokens and learned tokens of the training.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from edgetune.data.render import Renderer
    from edgetune.errors import InputError
    from edgetune.models import load_tokenizer, resolve, stop_ids
    from edgetune.recipe import ModelSection

    base = resolve(ModelSection(id=job["model"]))
    renderer = Renderer(load_tokenizer(base.path), set(stop_ids(base.path)))
    out = Path(job["out"])
    found: dict[str, Any] = {"model": str(base.path), "model_id": base.id}
    for which in ("train", "validation"):
        lines = Path(job[which]).read_text(encoding="utf-8").splitlines()
        rows = [renderer.encode(json.loads(line), "assistant") for line in lines]
        passes = 1
        chosen = [at for at, row in enumerate(rows) if len(row.ids) <= job["longest"]]
        if which == "train":
            chosen, passes = choose([len(row.ids) for row in rows], job["tokens"], job["longest"], job["batch_size"])
        if not chosen:
            few = f"fewer than {job['batch_size']} rows" if which == "train" else "no rows"
            raise InputError(f"{few} of at most {job['longest']} tokens", where=job[which])
        (out / f"{which}.jsonl").write_text("".join(lines[row] + "\n" for row in chosen), encoding="utf-8")
        (out / f"{which}_ids.jsonl").write_text(
            "".join(json.dumps(_labelled(rows[row])) + "\n" for row in chosen), encoding="utf-8"
        )
        lengths = sorted(len(rows[row].ids) for row in chosen)
        found[which] = {
            "rows": len(chosen),
            "passes": passes,
            "tokens": passes * sum(lengths),
            "learned_tokens": passes * sum(sum(rows[row].learned) for row in chosen),
            "shortest": lengths[0],
            "longest": lengths[-1],
        }
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base.path))
    found["parameters"] = empty.num_parameters()
    return found


def _labelled(row: Any) -> dict[str, list[int]]:
    ids = [int(token) for token in row.ids]
    return {
        "input_ids": ids,
        "labels": [token if learned else -100 for token, learned in zip(ids, row.learned, strict=True)],
    }


def rate(job: dict[str, Any]) -> dict[str, float]:
    """Fastest product of each shape in 10^9 operations a second, bfloat16 and float32, with torch's threads."""
    import torch

    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        for name, (m, k, n) in _SHAPES.items():
            left, right = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
            best, times, end = float("inf"), 0, time.perf_counter() + _RATE_SECONDS
            while times < 3 or time.perf_counter() < end:
                start = time.perf_counter()
                torch.mm(left, right)
                best, times = min(best, time.perf_counter() - start), times + 1
            found[f"{str(dtype).removeprefix('torch.')} {name}"] = round(2 * m * k * n / best / 1e9, 1)
    return found


def loss(job: dict[str, Any]) -> dict[str, float]:
    """Mean loss over the learned tokens of the validation rows: of the base, and with each of `adapters`.

    Plain transformers and peft in float32, one row after the other, so that the judge is neither side's own.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    rows = [json.loads(line) for line in Path(job["rows"]).read_text(encoding="utf-8").splitlines()]
    names = list(job["adapters"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    model = PeftModel.from_pretrained(model, job["adapters"][names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(job["adapters"][name], adapter_name=name)
    model.eval()

    def mean() -> float:
        total, count = 0.0, 0
        for row in rows:
            targets = torch.tensor(row["labels"])[1:]
            at = (targets != -100).nonzero().flatten()
            logits = model(input_ids=torch.tensor([row["input_ids"]]), logits_to_keep=at, use_cache=False).logits[0]
            total += float(torch.nn.functional.cross_entropy(logits.float(), targets[at], reduction="sum"))
            count += len(at)
        return total / count

    found = {}
    with torch.inference_mode():
        with model.disable_adapter():
            found["base"] = mean()
        for name in names:
            model.set_adapter(name)
            found[name] = mean()
    return found


def main(name: str, file: Path) -> None:
    """Answer one job."""
    from edgetune.errors import EdgetuneError

    job = json.loads(file.read_text(encoding="utf-8"))
    try:
        answer = {"prepare": prepare, "rate": rate, "loss": loss}[name](job)
    except EdgetuneError as error:
        raise SystemExit(f"error: {error}") from error
    Path(job["answer"]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
