"""Texts that a language model writes itself, temperature 1: data to calibrate it on and to compare it on.

    python benchmarks/own_samples.py MODEL OUT [--texts 768] [--tokens 230] [--held-out 40]

OUT gets train.jsonl and validation.jsonl, a `{"text": …}` a line, without the first token that begins every text.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

_TOGETHER = 96  # texts that are drawn at once; a cache of more is copied longer than it is computed with


def write(model: Path, out: Path, texts: int = 768, tokens: int = 230, held_out: int = 40, seed: int = 1) -> None:
    """Draw texts from the float32 model. A text ends at the first special token, or after so many tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    draw = torch.Generator().manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model)
    writer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ends = set(tokenizer.added_tokens_decoder)
    lines = []
    for start in range(0, texts, _TOGETHER):
        for row in _rows(writer, tokenizer.bos_token_id, min(_TOGETHER, texts - start), tokens, draw):
            end = next((at for at, token in enumerate(row) if token in ends), len(row))
            text = tokenizer.decode(row[:end]).strip()
            if len(text) > 40:
                lines.append(json.dumps({"text": text}) + "\n")
    out.mkdir(parents=True, exist_ok=True)
    (out / "validation.jsonl").write_text("".join(lines[:held_out]), encoding="utf-8")
    (out / "train.jsonl").write_text("".join(lines[held_out:]), encoding="utf-8")


def _rows(writer: Any, first: int, texts: int, tokens: int, draw: Any) -> list[list[int]]:
    """Token ids of `texts` rows, drawn together."""
    import torch

    ids = last = torch.full((texts, 1), first)
    cache = None
    with torch.inference_mode():
        for _ in range(tokens):
            told = writer(input_ids=last, past_key_values=cache, use_cache=True)
            cache, sums = told.past_key_values, told.logits[:, -1].softmax(-1).cumsum(-1)
            drawn = torch.rand(texts, 1, generator=draw) * sums[:, -1:]
            last = torch.searchsorted(sums, drawn).clamp(max=sums.shape[1] - 1)
            ids = torch.cat((ids, last), 1)
    return ids[:, 1:].tolist()


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--texts", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=230)
    parser.add_argument("--held-out", type=int, default=40)
    args = parser.parse_args()
    write(args.model, args.out, args.texts, args.tokens, args.held_out)


if __name__ == "__main__":
    main()
