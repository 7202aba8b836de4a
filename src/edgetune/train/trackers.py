"""TensorBoard and trackio, by name in the recipe: the rows of `metrics.jsonl`, sent on as they come.

A tracker is fed from the rows and not from Trainer's own log: when a training resumes, the rows up to its checkpoint are
sent anew into an empty place, so that no step stands there twice. Both trackers write files on this machine and open no
connection.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from edgetune import progress
from edgetune.errors import InputError
from edgetune.files import digest

PROJECT = "edgetune"  # trackio's name for what belongs together: `trackio show --project edgetune`

Row = Mapping[str, Any]


class _Tracker(Protocol):
    def write(self, rows: Sequence[Row]) -> None: ...

    def close(self) -> None: ...


def check(names: Sequence[str]) -> None:
    """Raise InputError when a tracker's library is not installed. Nothing is imported; to be called before training."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise InputError(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed",
            where="train.trackers",
            fix="pip install 'edgetune[trackers]', or leave train.trackers empty: metrics.jsonl and the plot are always written",
        )


def scalars(row: Row) -> dict[str, float]:
    """What of a metrics row is sent: `train/loss`, `train/learning_rate`, `train/grad_norm`, `train/tokens_per_s`,
    `validation/loss`, `validation/perplexity`, `validation/token_accuracy`; those that the row has."""
    found = {f"train/{name}": row[name] for name in ("loss", "learning_rate", "grad_norm") if name in row}
    if row.get("seconds") and "tokens" in row:
        found["train/tokens_per_s"] = row["tokens"] / row["seconds"]
    for name in ("loss", "perplexity", "token_accuracy"):
        if f"validation_{name}" in row:
            found[f"validation/{name}"] = row[f"validation_{name}"]
    return {name: float(value) for name, value in found.items()}


def callbacks(
    names: Sequence[str], run_name: str, folder: Path, parameters: Mapping[str, Any], metrics: Sequence[Row]
) -> list[Any]:
    """The recipe's trackers as callbacks of transformers' Trainer. They go behind the callback that records the rows.

    Args:
        names: `train.trackers`.
        run_name: what the run is called there.
        folder: outlives an interruption (the folder of the checkpoints); TensorBoard's files go to `folder/tensorboard`.
        parameters: the options of the training, shown beside the curves.
        metrics: the list that the rows are appended to while training goes on.

    Returns:
        At most one `transformers.TrainerCallback`. A tracker that fails is said so once and left out from then on.

    Raises:
        InputError: a library is not installed.
    """
    check(names)
    if not names:
        return []
    from transformers import TrainerCallback

    opened: dict[str, Callable[[], _Tracker]] = {
        "tensorboard": lambda: _TensorBoard(folder / "tensorboard", parameters),
        "trackio": lambda: _Trackio(run_name, digest(str(folder.resolve())), parameters),
    }

    class Trackers(TrainerCallback):
        """Sends the rows that were not sent yet to each tracker that still works."""

        def __init__(self) -> None:
            self.trackers: dict[str, _Tracker] = {}
            self.sent = 0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not state.is_world_process_zero:
                return
            self.sent = 0
            for name in dict.fromkeys(names):
                self.guarded(name, partial(self.open, name))
            self.send()

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.send()

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.send()
            for name in list(self.trackers):
                self.guarded(name, self.trackers[name].close)
            self.trackers.clear()

        def send(self) -> None:
            if not self.trackers or self.sent == len(metrics):
                return
            rows, self.sent = metrics[self.sent :], len(metrics)
            for name in list(self.trackers):
                self.guarded(name, partial(self.trackers[name].write, rows))

        def open(self, name: str) -> None:
            self.trackers[name] = opened[name]()

        def guarded(self, name: str, do: Callable[[], None]) -> None:
            try:
                do()
            except Exception as error:  # noqa: BLE001 - whatever goes wrong in a tracker is no reason to end a training
                self.trackers.pop(name, None)
                what = str(error).strip().splitlines()[:1] or [""]
                progress.say(
                    f"train: warning: {name} gets no more metrics ({type(error).__name__}: {what[0]}); training goes on, "
                    "and metrics.jsonl has all of them"
                )

    return [Trackers()]


class _TensorBoard:
    """Event files in a folder that is emptied first."""

    def __init__(self, folder: Path, parameters: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(folder, ignore_errors=True)
        self._writer = SummaryWriter(str(folder))
        self._writer.add_text("recipe", f"```json\n{json.dumps(parameters, indent=2, default=str)}\n```", 0)

    def write(self, rows: Sequence[Row]) -> None:
        for row in rows:
            for name, value in scalars(row).items():
                self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()  # a training that is watched, or killed, has them on disk

    def close(self) -> None:
        self._writer.close()


class _Trackio:
    """A run in trackio's local database.

    Written through its storage class: `trackio.init` starts a thread, prints on stdout, and asks the hub for the user's
    name where a token lies.
    """

    def __init__(self, name: str, run_id: str, parameters: Mapping[str, Any]) -> None:
        from trackio.sqlite_storage import SQLiteStorage

        self._storage, self._name, self._id = SQLiteStorage, name, run_id
        created = datetime.now(UTC).isoformat()
        own = {"_Username": None, "_Created": created, "_Group": None}  # keys that trackio's dashboard looks for
        self._config: dict[str, Any] | None = {**json.loads(json.dumps(parameters, default=str)), **own}
        SQLiteStorage.delete_run(PROJECT, name, run_id=run_id)  # an earlier training of this run folder

    def write(self, rows: Sequence[Row]) -> None:
        told = [(row["step"], scalars(row)) for row in rows if scalars(row)]
        if told:
            self._storage.bulk_log(
                PROJECT,
                self._name,
                [values for _, values in told],
                steps=[step for step, _ in told],
                config=self._config,
                run_id=self._id,
            )
            self._config = None  # once is enough

    def close(self) -> None:
        pass
