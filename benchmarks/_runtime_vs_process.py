"""The other side of `_runtime_vs_engine.py`: an engine's process, started and asked."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from edgetune.errors import EdgetuneError

_SCRIPT = Path(__file__).parent / "_runtime_vs_engine.py"
OURS = "edgetune"


@dataclass(frozen=True)
class Entry:
    """One line of the table: a model file in an engine.

    Attributes:
        name: as people read it.
        engine: of `_runtime_vs_engine.ENGINES`.
        python: the interpreter of its environment.
        model: artifact folder or GGUF file.
        threads: None for the engine's own choice.
        size_mb: of the file or folder, 10^6 bytes.
        read_bytes: of weights a decoding step reads, as far as that is known.
        note: said under the table, or empty.
        settings: edgetune's, of a session; `profile.Settings` as a mapping.
    """

    name: str
    engine: str
    python: str
    model: str
    threads: int | None
    size_mb: float
    read_bytes: int | None
    note: str = ""
    settings: dict[str, Any] | None = None


class Engine:
    """A process with a loaded model; a context manager.

    Args:
        entry: what is loaded.
        context: tokens that it must hold.
        logits: whether logits will be asked for.

    Raises:
        EdgetuneError: it cannot be loaded, or the process died.
    """

    def __init__(self, entry: Entry, context: int, logits: bool = False) -> None:
        job = {
            "engine": entry.engine,
            "model": entry.model or None,
            "threads": entry.threads,
            "settings": entry.settings,
            "context": context,
            "logits": logits,
        }
        environment = dict(os.environ)
        if entry.engine != OURS:  # a foreign environment must not see this one's packages
            environment.pop("PYTHONPATH", None)
        self._errors: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [entry.python, str(_SCRIPT), json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
            env=environment,
        )
        self.entry, self.pid = entry, self._process.pid
        self.memory: dict[str, float] = {}
        try:
            self.facts = self._answer()
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(BrokenPipeError):
                if stream:
                    stream.close()

    def generate(self, ids: Sequence[int], new: int) -> dict[str, Any]:
        """Answer greedily: ttft_ms, itl_ms (new - 1 of them), tokens, and the process's memory."""
        return self._ask({"generate": list(ids), "new": new})

    def encode(self, text: str) -> list[int]:
        """Token ids of a text by the engine's own tokenizer."""
        return list(self._ask({"encode": text})["ids"])

    def logits(self, ids: Sequence[int], out: Path) -> None:
        """Save logits (S, V), float32, of a row."""
        self._ask({"logits": list(ids), "out": str(out)})

    def quantize(self, source: Path, out: Path, kind: str) -> None:
        """llama.cpp: write a GGUF file in another type."""
        self._ask({"quantize": {"source": str(source), "out": str(out), "kind": kind}})

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is dead: reading its answer says how it died
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            tail = "\n  ".join(self._errors.read().strip().splitlines()[-5:])
            raise EdgetuneError(f"its process ended ({code})\n  {tail}", where=self.entry.name)
        message: dict[str, Any] = json.loads(line)
        if "error" in message:
            raise EdgetuneError(message["error"], where=self.entry.name)
        self.memory = {name: message[name] for name in ("peak_rss_mb", "rss_mb", "pss_mb") if name in message}
        return message
