"""A sweep: one run for each combination of values, compared by validation loss; only the best goes on.

A point is a run like any other, in `RUNS_DIR/NAME-sweep/POINT/`, done until `train`. What is fresh there is not done again
and an interrupted training goes on from its checkpoint, so the same command finishes a sweep that was interrupted. Points
whose data stage is the same share its files. `sweep.json` and `sweep.png` lie beside the points.
"""

from __future__ import annotations

import gc
import json
import os
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from edgetune import progress
from edgetune.errors import EdgetuneError, InputError, first_line, from_system_error
from edgetune.files import digest, staged_folder, write_json
from edgetune.recipe_file import LoadedRecipe, load
from edgetune.run import STAGES, RunFolder, read_manifest
from edgetune.stage_work import look_at_rows
from edgetune.sweep_report import as_json, plot, short_keys, shown

if TYPE_CHECKING:
    from edgetune.models import Base
    from edgetune.pipeline import Pipeline
    from edgetune.run import Result

_OWN = ("name", "runs_dir")  # decide where the points lie, so they cannot differ between them
_LONGEST_NAME = 100  # of a run, see recipe.RunName


@dataclass
class Point:
    """One combination of values and what came of it.

    Attributes:
        values: recipe key → value, as the recipe has it.
        loaded: the recipe with these values, and its run folder.
        report: the training's report, once it is done.
        error: why it failed.
    """

    values: dict[str, Any]
    loaded: LoadedRecipe
    report: dict[str, Any] | None = None
    error: str | None = None

    @property
    def label(self) -> str:
        """`train.rank=8 train.learning_rate=0.0001`."""
        return " ".join(f"{key}={shown(value)}" for key, value in self.values.items())

    @property
    def loss(self) -> float:
        """The best validation loss in nats a token; infinite where there is none."""
        return float(self.report["validation"]["after"]["loss"]) if self.report else float("inf")

    @property
    def command(self) -> str:
        """What does the point's next stages."""
        return f"edgetune run {shlex.join([str(self.loaded.path), *self.loaded.overrides])}"


@dataclass
class Sweep:
    """The points of a sweep, in the order in which they are run, and its folder."""

    folder: Path
    recipe: Path
    axes: dict[str, list[Any]]
    points: list[Point]
    comparable: bool = True
    bases: dict[str, Base] = field(default_factory=dict)

    def ranked(self) -> list[Point]:
        """The points by validation loss, the failed and those to come at the end."""
        return sorted(self.points, key=lambda point: (point.loss, point.error is None))

    def best(self) -> Point | None:
        """The trained point of lowest validation loss."""
        first = self.ranked()[0]
        return first if first.report else None


def read(recipe: str, items: Sequence[str]) -> Sweep:
    """Read a sweep from its command line.

    Args:
        recipe: a recipe file or a shipped recipe's name.
        items: `key=value` for all points, `key=value,value` or `key=[value, value]` for a grid.

    Raises:
        InputError: an unknown key, a value that does not fit, the same point twice, fewer than two points, a key that
            has no part in training, several processes.
    """
    given: dict[str, list[str]] = {}
    for item in items:
        key, values = _split(item)
        if key in given:
            raise InputError(f"`{key}` stands twice", where=f"`{item}`", fix=f"write all values once: {key}=1,2")
        given[key] = values
    given = {key: _one_list(recipe, given, key) for key in given}
    axes = [key for key, values in given.items() if len(values) > 1]
    where = load(recipe, _overrides({key: values[0] for key, values in given.items()}))
    for key in axes:
        if key in _OWN or key.split(".")[0] not in ("model", "data", "train", "seed"):
            raise InputError(
                f"`{key}` has no part in training, by which a sweep compares",
                where=f"`{key}={','.join(given[key])}`",
                fix="give it one value, or quote a comma that belongs to it; several for keys of model, data, train, or seed",
            )
    if not axes:
        raise InputError(
            "a sweep needs several values for at least one key",
            fix="for example train.learning_rate=1e-4,2e-4 train.rank=8,16",
        )
    folder = where.run_dir.with_name(f"{where.run_dir.name}-sweep")
    points: dict[str, Point] = {}
    for texts in product(*given.values()):
        point = _point(recipe, dict(zip(given, texts, strict=True)), axes, folder)
        same = points.setdefault(digest(point.values), point)
        if same is not point:
            raise InputError(f"the same point twice: {point.label}", fix="name each value once (1e-4 is 0.0001)")
    distinct = {key: list({digest(p.values[key]): p.values[key] for p in points.values()}.values()) for key in axes}
    return Sweep(folder, where.path, distinct, list(points.values()))


def _split(item: str) -> tuple[str, list[str]]:
    """`key=a,b` → key and the texts of its values, split at the commas that YAML would split a list at."""
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise InputError(
            "values are written key=value,value without spaces around the commas",
            where=f"`{item}`",
            fix="for example train.learning_rate=1e-4,2e-4",
        )
    if "," not in text:
        return key, [text]
    return key, _items(text, item)


def _items(text: str, item: str) -> list[str]:
    """The texts of the entries of a YAML list, given without its brackets."""
    whole = f"[{text}]"
    try:
        node = yaml.compose(whole, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise InputError(
            "the values are not valid YAML", where=f"`{item}`", fix="quote what has commas or brackets of its own"
        ) from error
    if not isinstance(node, yaml.SequenceNode) or text.rstrip().endswith(","):
        raise InputError("a value is missing at a comma", where=f"`{item}`", fix="write null for no value")
    return [whole[entry.start_mark.index : entry.end_mark.index] for entry in node.value]


def _one_list(recipe: str, given: Mapping[str, list[str]], key: str) -> list[str]:
    """The values of `key` where they are one list in brackets: its entries, or the list where the key itself takes one."""
    values = given[key]
    if len(values) > 1 or not (values[0].startswith("[") and values[0].endswith("]")) or key in _OWN:
        return values
    try:
        load(recipe, _overrides({name: texts[0] for name, texts in given.items()}))
    except InputError:
        return _items(values[0][1:-1], f"{key}={values[0]}") or values
    return values


def _overrides(texts: Mapping[str, str]) -> list[str]:
    return [f"{key}={text}" for key, text in texts.items()]


def _point(recipe: str, texts: Mapping[str, str], axes: Sequence[str], folder: Path) -> Point:
    common = _overrides({key: text for key, text in texts.items() if key not in _OWN})
    found = load(recipe, common).recipe.model_dump()
    if found["train"]["distributed"]:
        raise InputError(
            "a sweep trains each point in one process",
            where="train.distributed",
            fix="remove it (train.distributed=null), or run the points one by one with `edgetune train`",
        )
    values = {key: _at(found, key) for key in axes}
    named = str(folder) if yaml.safe_load(str(folder)) == str(folder) else json.dumps(str(folder))
    return Point(values, load(recipe, [*common, f"runs_dir={named}", f"name={_name(values)}"]))


def _at(recipe: Any, key: str) -> Any:
    for part in key.split("."):
        recipe = recipe[part]
    return recipe


def _name(values: Mapping[str, Any]) -> str:
    """The run's name: `rank-8--learning_rate-0.0001`. Where a value is no part of a file name, a digest makes it its own."""
    parts = []
    for name, value in zip(short_keys(values), values.values(), strict=True):
        text = value if isinstance(value, str) else json.dumps(value)
        clean = re.sub(r"[^A-Za-z0-9._-]+", "-", text.rsplit("/", 1)[-1]).strip("-.")[:40]
        parts.append(f"{name}-{clean}" if clean == text else f"{name}-{clean}-{digest(value)[:6]}")
    whole = "--".join(parts)
    return whole if len(whole) <= _LONGEST_NAME else f"{whole[: _LONGEST_NAME - 13]}-{digest(dict(values))[:12]}"


def run(sweep: Sweep, until: str = "train") -> None:
    """Train every point that is not trained yet; `sweep.points` and sweep.json tell what came of each.

    A point that fails does not end the others.

    Args:
        sweep: from `read`.
        until: how far the best is to be carried on afterwards; only to refuse now what is sure to fail then.

    Raises:
        InputError: data, model or target cannot be used; raised before any point is trained.
    """
    pipelines = _prepared(sweep, until)
    with RunFolder(sweep.folder).locked():
        _share_data(pipelines)
        for pipeline in pipelines if "export" in STAGES[: STAGES.index(until) + 1] else ():
            look_at_rows(pipeline.recipe, pipeline.folder.report("data"))
        for number, (point, pipeline) in enumerate(zip(sweep.points, pipelines, strict=True), 1):
            progress.say(f"point {number} of {len(pipelines)}: {point.label}")
            try:
                point.report = pipeline.run(until="train").reports["train"]
            except (EdgetuneError, OSError, MemoryError, RuntimeError, ValueError) as error:
                known = error if isinstance(error, EdgetuneError) else from_system_error(error)
                point.error = known.text() if known else f"unexpected {type(error).__name__}: {first_line(error)}"
                progress.say(f"point {number} failed: {point.error}")
            gc.collect()
            sweep.comparable = len({_measured_on(p) for p in sweep.points if p.report}) <= 1
            write_json(sweep.folder / "sweep.json", as_json(sweep))
        if sweep.best():
            plot(sweep, sweep.folder / "sweep.png")


def _prepared(sweep: Sweep, until: str) -> list[Pipeline]:
    """A pipeline for each point. Refuses what is sure to fail, and fetches the base models."""
    from edgetune.pipeline import Pipeline
    from edgetune.train import crew, distributed

    pipelines, wanted = [], STAGES[: STAGES.index(until) + 1]
    for point in sweep.points:
        model = digest(point.loaded.recipe.model.model_dump())
        section = point.loaded.recipe.train
        several = crew.find(section, None, None, {})  # with `train.distributed` one a GPU of this machine
        if several:
            distributed.check(section, several.size)
        pipeline = Pipeline(point.loaded, sweep.bases.get(model), several)
        pipeline.look_before(wanted)
        sweep.bases[model] = pipeline.base()
        if "export" in wanted:
            pipeline.preflight()
        pipelines.append(pipeline)
    return pipelines


def _share_data(pipelines: Sequence[Pipeline]) -> None:
    """Do each different data stage once, and put its files (hard links) where a point needs the same."""
    done: dict[str, Path] = {}
    for pipeline in pipelines:
        work, here = pipeline.work("data"), pipeline.folder.output("data")
        if pipeline.folder.stale(work) is None:
            done.setdefault(work.key, here)
    for pipeline in pipelines:
        work, here = pipeline.work("data"), pipeline.folder.output("data")
        if work.key not in done:
            pipeline.run(until="data")
            done[work.key] = here
        elif pipeline.folder.stale(work):
            with pipeline.folder.locked(), staged_folder(here) as out:
                shutil.copytree(done[work.key], out, copy_function=_link, dirs_exist_ok=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a disk without hard links
        shutil.copy2(source, target)


def _measured_on(point: Point) -> str:
    """Digest of the rows and of what makes tokens of them: losses compare where it is the same."""
    folder = RunFolder(point.loaded.run_dir)
    outputs = read_manifest(folder.output("data")).get("outputs", {})
    recipe = point.loaded.recipe
    return digest(
        {
            "rows": {name: entry["sha256"] for name, entry in outputs.items() if name.startswith("validation")},
            "reading": [recipe.data.train_on, recipe.data.max_length],
            "tokenizer": recipe.model.model_dump(exclude={"trust_remote_code"}),
        }
    )


def carry_on(sweep: Sweep, until: str) -> Result | None:
    """Run the best point until `until`. None where no point was trained, or `until` is `train`."""
    from edgetune.pipeline import Pipeline

    best = sweep.best()
    if best is None or until == "train":
        return None
    progress.say(f"best: {best.label}")
    model = digest(best.loaded.recipe.model.model_dump())
    return Pipeline(best.loaded, sweep.bases.get(model)).run(until=until)


def raise_for_failures(sweep: Sweep) -> None:
    """Raise EdgetuneError when points failed, with what each of them said."""
    failed = [point for point in sweep.points if point.error]
    if failed:
        raise EdgetuneError(
            f"{len(failed)} of {len(sweep.points)} points failed\n"
            + "\n".join(f"{point.label}: {point.error}" for point in failed),
            where=sweep.folder,
        )


def estimate(sweep: Sweep) -> list[dict[str, Any]]:
    """What a sweep would do: for each point `values`, `run`, `state` and `seconds` (None where it cannot be said), and
    `problems`: the checks of its plan that fail. Nothing is written."""
    from edgetune.plan import plan

    found = []
    for point in sweep.points:
        planned = plan(point.loaded, first=None, until="train", force=False)
        redone = [stage for stage in planned["stages"] if stage["redo"]]
        known = all(stage["seconds"] is not None for stage in redone)
        state = "trained already" if not redone else "to be trained"
        if redone and any((point.loaded.run_dir / "checkpoints").glob("checkpoint-*")):
            state = "to be gone on with, from its checkpoint"
        found.append(
            {
                "values": point.values,
                "run": str(point.loaded.run_dir),
                "state": state,
                "seconds": sum(stage["seconds"] for stage in redone) if known else None,
                "problems": [check["what"] for check in planned["checks"] if not check["ok"]],
            }
        )
    return found
