"""How far each engine's next-token distributions are from the merged model's, for `runtime_vs.py`.

    python _runtime_vs_quality.py JOB.json

In a process of its own, as it needs torch. The held-out rows are rendered and compared as edgetune's gate does it.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _runtime_vs_process import OURS, Engine, Entry

from edgetune import progress
from edgetune.errors import EdgetuneError

_GREEDY = 24  # tokens of an answer that are compared
_PROMPTS = 8


def main(file: Path) -> None:
    """Answer a job: `merged`, `rows` (a file), `most` rows, `entries`, `check` (an entry whose tokens are compared, or
    None), `answer` (the file that gets the answer)."""
    from edgetune.models.quiet import quiet

    job = json.loads(file.read_text(encoding="utf-8"))
    entries, check = [Entry(**entry) for entry in job["entries"]], Entry(**job["check"]) if job["check"] else None
    try:
        with quiet():
            answer = measure(Path(job["merged"]), Path(job["rows"]), job["most"], entries, check)
    except EdgetuneError as error:
        raise SystemExit(f"error: {error}") from error
    Path(job["answer"]).write_text(json.dumps(answer), encoding="utf-8")


def measure(
    merged: Path, file: Path, most: int, entries: Sequence[Entry], check: Entry | None
) -> dict[str, dict[str, Any]]:
    """Statistics of `scores.Scores.summary` for each entry by name, or `failed`; of the checked one, `greedy` too."""
    from edgetune.data.examine import encode_any
    from edgetune.data.render import Renderer
    from edgetune.export.readers import ends, longest, open_reader, pieces
    from edgetune.export.scores import Scores
    from edgetune.models import load_tokenizer

    tokenizer, stops = load_tokenizer(merged), set(ends(merged))
    rows = encode_any(file, Renderer(tokenizer, stops), "assistant", longest(merged), most)
    wanted = open_reader(merged)
    context = max(len(row.ids) for row in rows) + _GREEDY
    found: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        readers: dict[str, Any] = {}
        for entry in [*entries, *([check] if check else [])]:
            try:
                readers[entry.name] = (
                    open_reader(Path(entry.model))
                    if entry.engine == OURS
                    else Remote(stack.enter_context(Engine(entry, context, logits=True)), Path(folder))
                )
            except EdgetuneError as error:
                found[entry.name] = {"failed": str(error)}
        if not readers:
            return found
        scores = {name: Scores() for name in readers}
        with progress.task("divergence", len(rows)) as shown:
            for number, row in enumerate(rows):
                start = 0
                streams = {name: pieces(reader, row.ids) for name, reader in readers.items()}
                for p in pieces(wanted, row.ids):
                    for name, stream in streams.items():
                        scores[name].add(p, next(stream), number, start, row.ids, row.learned)
                    start += len(p)
                shown.advance()
        found |= {name: score.summary() for name, score in scores.items()}
    if check and "failed" not in found[check.name]:
        prompts = [row.ids[: row.learned.index(True)] for row in rows[:_PROMPTS]]
        texts = [tokenizer.decode(row.ids) for row in rows]
        found[check.name]["greedy"] = greedy_check(check, wanted, prompts, texts, tokenizer, context)
    return found


class Remote:
    """An engine's logits as `readers.Reader` has them; rows are read whole."""

    most = None

    def __init__(self, engine: Engine, folder: Path) -> None:
        self._engine, self._file = engine, folder / f"{engine.pid}.npy"
        self.vocabulary = 0

    def reset(self) -> None:
        """Each row is read from its beginning anyway."""

    def feed(self, ids: Sequence[int], last: bool = False) -> Any:
        """Logits (len(ids), V) of a row, float32."""
        import torch

        self._engine.logits(ids, self._file)
        return torch.from_numpy(np.load(self._file))


def greedy_check(
    entry: Entry, wanted: Any, prompts: Sequence[Sequence[int]], texts: Sequence[str], tokenizer: Any, context: int
) -> dict[str, int]:
    """Whether a GGUF file is the merged model: `same` of `tokens` greedy tokens over all prompts (a prompt counts up to
    the first that differs), and how many of `texts` are cut into tokens alike (`alike`)."""
    from edgetune.export.readers import greedy

    same = alike = 0
    with Engine(entry, context) as engine:
        for prompt in prompts:
            ours = greedy(wanted, prompt, _GREEDY, set())
            same += agreeing(ours, engine.generate(prompt, _GREEDY)["tokens"])
        for text in texts:
            alike += engine.encode(text) == tokenizer(text, add_special_tokens=False).input_ids
    return {"same": same, "tokens": _GREEDY * len(prompts), "alike": alike, "texts": len(texts)}


def agreeing(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two answers have in common before they part."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
