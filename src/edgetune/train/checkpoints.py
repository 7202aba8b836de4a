"""Checkpoints that are whole or absent, and the best adapter so far.

`transformers` writes a checkpoint file by file. Once all of it is on disk a `complete.json` with the files' hashes
is added, and only a checkpoint that still matches it is resumed from. Of several processes only the first writes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from edgetune.files import read_json, sha256_file, staged_folder, write_json, write_text
from edgetune.train import distributed, method, shards

_MARK = "complete.json"
_SMALL = 50_000_000  # parameters of which a copy costs little


class Checkpoints:
    """The checkpoint folder of one training.

    Args:
        folder: where checkpoints lie.
        key: digest of what is trained; checkpoints of anything else are thrown away.
        resume: whether to go on from the last whole checkpoint.
    """

    def __init__(self, folder: Path, key: str, resume: bool) -> None:
        self.folder, self._writes = folder, distributed.place().first
        self._metrics_file = folder / "metrics.jsonl"
        mark = folder / "key.json"
        same = mark.is_file() and read_json(mark) == {"key": key}
        if self._writes:
            if folder.exists() and not (same and resume):
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
            write_json(mark, {"key": key})
        self.last = self._last_whole()
        self.step = int(self.last.name.rsplit("-", 1)[1]) if self.last else 0
        self.metrics = [row for row in self._read_metrics() if row["step"] <= self.step] if self.last else []
        self._write_metrics()
        if not self.last and self._writes:
            (folder / "settled.json").unlink(missing_ok=True)

    def settle(self, name: str, decide: Callable[[], Any]) -> Any:
        """What `decide` says when training begins, as JSON; whoever resumes gets that, and `decide` is not asked.

        The first process decides for all.
        """
        path = self.folder / "settled.json"
        settled = read_json(path) if path.is_file() and self._writes else {}
        if name not in settled and self._writes:
            settled[name] = decide()
            write_json(path, settled)
        return distributed.agreed(settled.get(name))

    def _last_whole(self) -> Path | None:
        found = sorted(
            self.folder.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]), reverse=True
        )
        for path in found:
            if _whole(path):
                return path
            if self._writes:
                shutil.rmtree(path)
        return None

    def complete(self, step: int) -> None:
        """Mark the checkpoint of `step`, just written, as whole, and drop those before the previous one."""
        if not self._writes:
            return
        self._write_metrics()
        path = self.folder / f"checkpoint-{step}"
        write_json(path / _MARK, {file.name: sha256_file(file) for file in path.iterdir() if file.is_file()})
        older = [p for p in self.folder.glob("checkpoint-*") if int(p.name.rsplit("-", 1)[1]) < step]
        for old in sorted(older, key=lambda p: int(p.name.rsplit("-", 1)[1]))[:-1]:
            shutil.rmtree(old)

    def record(self, row: dict[str, Any]) -> None:
        """Add a row to `metrics.jsonl`. It is sure to last once a checkpoint is complete: who resumes needs it only then."""
        self.metrics.append(row)
        if self._writes:
            with self._metrics_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def keep_best(self, model: Any, step: int, loss: float) -> None:
        """Keep the adapter as the best so far."""
        state = shards.whole_weights(model)
        if not self._writes:
            return
        with staged_folder(self.best) as folder:
            method.save(model, folder, state=state)
            write_json(folder / "best.json", {"step": step, "loss": loss})
            if shards.parameters(model, trained_only=True) <= _SMALL:
                save_file(state or _trained(model), str(folder / "trained"))

    def restore_best(self, model: Any) -> None:
        """Give the model the best weights so far, where what is trained is small; else it keeps what it has."""
        distributed.wait()  # for the first process, which writes it
        if (self.best / "trained").is_file():
            shards.put_weights(model, load_file(str(self.best / "trained")))

    @property
    def best(self) -> Path:
        """Folder of the best adapter."""
        return self.folder / "best"

    def validations(self) -> list[tuple[int, float]]:
        """(step, validation loss) so far, step 0 being the base model."""
        return [(row["step"], row["validation_loss"]) for row in self.metrics if "validation_loss" in row]

    def _read_metrics(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        if self._metrics_file.is_file():
            for line in self._metrics_file.read_text(encoding="utf-8").splitlines():
                try:
                    found.append(json.loads(line))
                except ValueError:  # killed while it was written; no checkpoint is that late
                    break
        return found

    def _write_metrics(self) -> None:
        if self._writes:
            write_text(self._metrics_file, "".join(json.dumps(row) + "\n" for row in self.metrics))


def _trained(model: Any) -> dict[str, Any]:
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def _whole(path: Path) -> bool:
    mark = path / _MARK
    if not mark.is_file():
        return False
    return all((path / name).is_file() and sha256_file(path / name) == value for name, value in read_json(mark).items())
