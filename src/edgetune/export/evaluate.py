"""Tasks of lm-evaluation-harness on an artifact, and on the model that it was made from.

https://github.com/EleutherAI/lm-evaluation-harness; tasks are its YAML files, its own or one's own.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from edgetune import progress
from edgetune.errors import EdgetuneError, InputError, first_line, require_extra
from edgetune.export.readers import adapter_of, model_at
from edgetune.files import write_json
from edgetune.runtime.hardware import versions

_CHECK = "check the task's YAML"
_BOOTSTRAP = 1000  # samples for the standard errors of metrics that are no means


def evaluate(
    artifact: Path,
    against: Path | None,
    tasks: Sequence[str],
    include: Path | None = None,
    *,
    shots: int | None = None,
    limit: int | None = None,
    chat: bool = False,
    provider: str | None = None,
    adapter: str | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Run tasks on one model or two.

    Args:
        artifact: artifact or run folder, its hashes checked; a folder of another tool's with genai_config.json; a
            transformers folder, a GGUF file, or `package:NAME`.
        against: a second one of these; of a run its merged model.
        tasks: names of tasks, groups or tags, several with commas between; or YAML files of tasks.
        include: folder with further tasks.
        shots: solved examples before each question; the task's own number when None.
        limit: only the first rows of each task; all when None.
        chat: ask through the chat template.
        provider: where the artifact runs; what it was made for when None.
        adapter: of an artifact that carries adapters, which one is on; `none`: the base; its only one when None.
        out: JSON file for the result.

    Returns:
        `models` (paths), `names`, `adapters` (the one that is on in each, or None), `tasks`: for each `metrics`: for each metric `values` and `stderr` (one a model), and with two
        models `difference` and `difference_stderr` (paired by row); `rows`, `shots`, `version`; `versions`.

    Raises:
        InputError: lm-evaluation-harness is not installed, there is no such task or adapter, or its data cannot be had;
            the artifact's execution provider is missing here.
    """
    require_extra("evaluate")
    folders = [_folder(artifact, "artifact"), *([] if against is None else [_folder(against, "merged")])]
    on = [adapter_of(folders[0], adapter), *map(adapter_of, folders[1:])]
    asked = [(provider, adapter), (None, None)]  # of the artifact; the other model is what it is by itself
    with _quiet():
        loaded = _load(tasks, include, shots)
        results = [_run(folder, loaded, limit, chat, *how) for folder, how in zip(folders, asked, strict=False)]
    found = {
        "models": [str(folder) for folder in folders],
        "names": [_named(*one) for one in zip((artifact, against), folders, on, strict=False)],
        "adapters": on,
        "tasks": {name: _task(name, results, loaded) for name in results[0]["results"]},
        "limit": limit,
        "chat": chat,
        "versions": versions("lm_eval", "onnxruntime", "transformers", "torch"),
    }
    if out is not None:
        write_json(out, found)
    return found


def _folder(path: Path, output: Literal["artifact", "merged"]) -> Path:
    """The folder of the model. Raises InputError: there is none, it is broken, or it is no decoder's."""
    from edgetune.runtime.artifact import open_artifact
    from edgetune.runtime.plain.description import FILE

    if (path / FILE).is_file():
        open_artifact(path)  # says what it is instead
    return model_at(path, output)


def _named(given: Path | None, folder: Path, adapter: str | None) -> str:
    """What people call a model: its folder or file, and the adapter that is on."""
    name = folder.name if given is None or given.is_dir() else given.name
    return f"{name}, {adapter}" if adapter else name


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the network, and without what the harness and its libraries say while they work."""
    from edgetune.models.quiet import quiet

    names = ("lm_eval", "datasets", "evaluate", "absl", "rouge_score")
    before = {name: logging.getLogger(name).level for name in names}
    os.environ["HF_DATASETS_OFFLINE"] = "1"  # task data is local; downloads are for those who ask for them
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        with quiet():
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def _load(tasks: Sequence[str], include: Path | None, shots: int | None) -> dict[str, Any]:
    """The tasks as the harness wants them, with their data."""
    from jinja2 import TemplateError
    from lm_eval.tasks import TaskManager

    from edgetune.recipe_file import shipped

    names, folders = _names(tasks, include)
    local = [*folders, shipped("recipes") / "tasks"]
    manager = TaskManager(include_path=local, include_defaults=False)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        manager = TaskManager(include_path=local)  # reads thousands of files
        unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise InputError(
            f"no such task: {', '.join(unknown)}", where="--tasks", fix="check the names, or --include-path"
        )
    loaded: dict[str, Any] = {}
    try:
        loaded = manager.load(names)
    except (OSError, ConnectionError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        if "output_type" in str(error):
            raise InputError(f"a task cannot be used: {first_line(error)}", fix=_CHECK) from error
        fix = "task data must be on this machine: a task with local data_files, or a filled data set cache"
        raise InputError(f"the data of {', '.join(names)} cannot be read: {first_line(error)}", fix=fix) from error
    except TemplateError as error:
        raise _unfit(error) from error
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (shots is not None and own != 0):  # 0 in a task's file is meant
            task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=1234)
    return loaded


def _unfit(error: Exception) -> InputError:
    return InputError(f"a task does not fit its data: {first_line(error)}", fix=_CHECK)


def _names(tasks: Sequence[str], include: Path | None) -> tuple[list[str], list[Path]]:
    """Task names, and the folders in which those that are files lie."""
    names: list[str] = []
    folders = [include] if include else []
    if include and not include.is_dir():
        raise InputError("no such folder", where=include, fix="check --include-path")
    for item in (part.strip() for text in tasks for part in text.split(",")):
        file = Path(item)
        if file.suffix not in (".yaml", ".yml"):
            names += [item] if item else []
            continue
        if not file.is_file():
            raise InputError("no such task file", where=file, fix="check --tasks")
        text = file.read_text(encoding="utf-8")
        try:
            yaml.compose(text)  # not loaded: the harness has tags of its own
        except yaml.YAMLError as error:
            raise InputError(f"not valid YAML: {' '.join(str(error).split())}", where=file, fix="correct it") from error
        named = re.search(r"^(?:task|group):\s*['\"]?([\w.-]+)", text, re.MULTILINE)
        if not named:
            raise InputError("names no task", where=file, fix="add `task: NAME`")
        names.append(named[1])
        folders.append(file.absolute().parent)
    if not names:
        raise InputError("no task is named", where="--tasks", fix="--tasks capitals")
    return names, folders


def _run(
    folder: Path, loaded: dict[str, Any], limit: int | None, chat: bool, provider: str | None, adapter: str | None
) -> dict[str, Any]:
    import lm_eval.evaluator
    from jinja2 import TemplateError

    from edgetune.export.harness import Folder

    with progress.task(f"evaluate {folder.name}") as bar:
        model = Folder(folder, bar, provider, adapter)
        if chat and not model.tokenizer.chat_template:
            raise InputError("has no chat template", where=folder, fix="leave --chat out")
        try:
            found = lm_eval.evaluator.evaluate(
                model,
                loaded,
                limit=limit,
                bootstrap_iters=_BOOTSTRAP,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
            )
        except TemplateError as error:
            raise _unfit(error) from error
    if not found or not found.get("results"):
        raise EdgetuneError("the harness gave no results", where=folder)
    return dict(found)


def _task(name: str, results: list[dict[str, Any]], loaded: dict[str, Any]) -> dict[str, Any]:
    """One task's metrics of every model, beside each other."""
    first = results[0]["results"][name]
    metrics = {}
    for key, value in first.items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        values = [_number(result["results"][name].get(key)) for result in results]
        errors = [_number(result["results"][name].get(f"{metric}_stderr,{filtered}")) for result in results]
        shown = metric if filtered == "none" else f"{metric} ({filtered})"
        metrics[shown] = {"values": values, "stderr": errors, **_difference(name, metric, filtered, values, results)}
    rows = results[0].get("n-samples", {}).get(name, {}).get("effective")
    return {
        "metrics": metrics,
        "rows": rows,
        "shots": results[0].get("n-shot", {}).get(name),
        "version": results[0].get("versions", {}).get(name),
    }


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _difference(
    name: str, metric: str, filtered: str, values: list[float | None], results: list[dict[str, Any]]
) -> dict[str, float | None]:
    """First minus second, and its standard error: rows are the same, so each is compared with itself."""
    if len(values) != 2 or values[0] is None or values[1] is None:
        return {}
    found: dict[str, float | None] = {"difference": values[0] - values[1], "difference_stderr": None}
    scores = []
    for result in results:
        rows = [row for row in result.get("samples", {}).get(name, []) if row.get("filter", filtered) == filtered]
        scores.append({row["doc_id"]: row.get(metric) for row in rows})
    pairs = [(scores[0][row], scores[1][row]) for row in scores[0].keys() & scores[1].keys()]
    if len(pairs) > 1 and all(isinstance(value, int | float) for pair in pairs for value in pair):
        apart = [float(a) - float(b) for a, b in pairs]
        if math.isclose(statistics.fmean(apart), values[0] - values[1], abs_tol=1e-9):  # the metric is a mean
            found["difference_stderr"] = statistics.stdev(apart) / math.sqrt(len(apart))
    return found


def table(found: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows for people: task, metric, one column a model, their difference."""
    two = len(found["models"]) == 2
    columns = (
        "task",
        "rows",
        "metric",
        *found["names"],
        *(["difference"] if two else []),
    )
    rows = []
    for name, task in found["tasks"].items():
        for metric, numbers in task["metrics"].items():
            cells = [_cell(*pair) for pair in zip(numbers["values"], numbers["stderr"], strict=True)]
            cells += [_cell(numbers.get("difference"), numbers.get("difference_stderr"), sign="+")] if two else []
            rows.append((name, str(task["rows"] or ""), metric, *cells))
    return columns, rows


def _cell(value: float | None, error: float | None, sign: str = "") -> str:
    if value is None:
        return "–"
    return f"{value:{sign}.4f}" + (f" ± {error:.4f}" if error is not None else "")
