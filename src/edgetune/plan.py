"""What a run would do, before it does it: stages, time, memory, disk, and the checks. Nothing in the run is written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

import psutil

from edgetune.data.examine import train_files
from edgetune.errors import EdgetuneError, InputError, require_extra
from edgetune.estimate import estimates
from edgetune.files import existing, home
from edgetune.models import Base, local
from edgetune.pipeline import Pipeline
from edgetune.recipe import Recipe
from edgetune.recipe_file import LoadedRecipe
from edgetune.run import STAGES
from edgetune.stage_work import look_at_base, look_at_rows
from edgetune.train import method, trackers
from edgetune.train.crew import Crew

_NOTHING = {"train": 0, "validation": 0, "rows": 0, "longest": 0}


def plan(
    loaded: LoadedRecipe, *, first: str | None, until: str | None, force: bool, crew: Crew | None = None
) -> dict[str, Any]:
    """Plan a run.

    Args:
        loaded: the recipe.
        first, until, force: as in `Pipeline.run`.
        crew: the processes that train; one when None.

    Returns:
        `recipe` (resolved), `run`, `stages` (each with `name`, `redo`, `why` and estimates: `seconds`, `memory_mb`,
        `disk_mb`, None where the base model is not on this machine yet), `checks` (`ok`, `what`).
    """
    recipe = loaded.recipe
    checks: list[dict[str, Any]] = []
    wanted = STAGES[: STAGES.index(until or STAGES[-1]) + 1]
    installed = _installed(recipe, wanted, checks)
    base = _base(recipe, checks) if installed else None
    tokens = _tokens(recipe, base, checks)
    if base and "export" in wanted:
        _exportable(recipe, base, tokens, loaded.run_dir, checks)
    pipeline = Pipeline(loaded, base)
    reasons: dict[str, str | None] = {}
    upstream: str | None = None
    forced = force
    for stage in wanted:
        forced = forced or stage == first
        if forced:
            why: str | None = "asked for"
        elif upstream:
            why = f"after {upstream}"
        elif base is None or not all(check["ok"] for check in checks):
            why = "not done yet"
        else:
            why = pipeline.folder.stale(pipeline.work(stage))
        upstream = upstream or (stage if why else None)
        reasons[stage] = why
    something = upstream is not None and tokens["train"] > 0
    estimates = _estimated(recipe, base, tokens, checks, crew) if base and something else {}
    stages = [
        {"name": stage, "redo": why is not None, "why": why, **estimates.get(stage, _UNKNOWN)}
        for stage, why in reasons.items()
    ]
    _machine(recipe, stages, loaded.run_dir, checks)
    return {"recipe": recipe.model_dump(), "run": str(loaded.run_dir), "stages": stages, "checks": checks}


_UNKNOWN = {"seconds": None, "memory_mb": None, "disk_mb": None}


def rows(planned: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """The stages as table rows, with a line for the sum of what is redone."""
    from edgetune.progress import clock

    found = []
    for stage in planned["stages"]:
        known = stage["redo"] and stage["seconds"] is not None
        found.append(
            (
                stage["name"],
                stage["why"] or "unchanged",
                f"about {clock(stage['seconds'])}" if known else ("?" if stage["redo"] else "-"),
                f"{stage['memory_mb']:,.0f} MB" if known else ("?" if stage["redo"] else "-"),
                f"{stage['disk_mb']:,.0f} MB" if known else ("?" if stage["redo"] else "-"),
            )
        )
    redone = [stage for stage in planned["stages"] if stage["redo"] and stage["seconds"] is not None]
    if redone:
        found.append(
            (
                "in all",
                f"{len(redone)} of {len(planned['stages'])} stages",
                f"about {clock(sum(s['seconds'] for s in redone))}",
                f"{max(s['memory_mb'] for s in redone):,.0f} MB",
                f"{sum(s['disk_mb'] for s in redone):,.0f} MB",
            )
        )
    return found


def _installed(recipe: Recipe, stages: Sequence[str], checks: list[dict[str, Any]]) -> bool:
    try:
        require_extra("train")
        method.require_installed(recipe.train)
        trackers.check(recipe.train.trackers)
        if "export" in stages:
            require_extra("export")
    except InputError as error:
        checks.append({"ok": False, "what": str(error)})
        return False
    checks.append({"ok": True, "what": "all that is needed is installed"})
    return True


def _base(recipe: Recipe, checks: list[dict[str, Any]]) -> Base | None:
    try:
        base = local(recipe.model)
    except EdgetuneError as error:
        checks.append({"ok": False, "what": f"base model: {error}"})
        return None
    said = (
        f"base model {recipe.model.id} is on this machine"
        if base
        else (f"base model {recipe.model.id} will be fetched first; estimates come once it is here")
    )
    checks.append({"ok": True, "what": said})
    return base


def _exportable(
    recipe: Recipe, base: Base, tokens: dict[str, int], run_dir: Path, checks: list[dict[str, Any]]
) -> None:
    """Whether what is trained can be exported."""
    try:
        look_at_base(recipe, base, run_dir)
        if tokens["rows"]:
            look_at_rows(recipe, {"rows": {"train": tokens["rows"]}, "tokens": tokens})
    except EdgetuneError as error:
        checks.append({"ok": False, "what": f"export: {error}"})
        return
    checks.append({"ok": True, "what": f"export: the target {recipe.export.target} can have this model"})


def _tokens(recipe: Recipe, base: Base | None, checks: list[dict[str, Any]]) -> dict[str, int]:
    """Tokens and rows of both sides: counted where the tokenizer is here, else from the size of the files."""
    missing = [str(path) for path in train_files(recipe.data) if not path.is_file()]
    if isinstance(recipe.data.validation, str) and not Path(recipe.data.validation).is_file():
        missing.append(recipe.data.validation)
    if missing:
        checks.append({"ok": False, "what": f"no such data file: {', '.join(missing)}"})
        return dict(_NOTHING)
    if base is None:
        return dict(_NOTHING)
    from edgetune.data.check import check

    try:
        checked = check(recipe.data, seed=recipe.seed, model=recipe.model, base=base)
    except EdgetuneError as error:
        checks.append({"ok": False, "what": f"data: {error}"})
        return dict(_NOTHING)
    told = checked.report
    if checked.count:
        checks.append(
            {
                "ok": False,
                "what": f"data: {checked.count} rows with problems; `edgetune data check` names them",
            }
        )
    sides = [f"{told['rows'][side]} {side} rows, {told['tokens'][side]:,} tokens" for side in ("train", "validation")]
    checks.append({"ok": True, "what": f"data: {'; '.join(sides)}"})
    checks += [{"ok": True, "what": f"data: {warning}"} for warning in told["warnings"]]
    if "train" not in told["length"]:  # no row can be used
        return dict(_NOTHING)
    return {**told["tokens"], "rows": told["rows"]["train"], "longest": told["length"]["train"]["max"]}


def _estimated(
    recipe: Recipe, base: Base, tokens: dict[str, int], checks: list[dict[str, Any]], crew: Crew | None
) -> dict[str, dict[str, float]]:
    try:
        found, said = estimates(recipe, base, tokens, *((crew.size, crew.local) if crew else ()))
    except EdgetuneError as error:
        checks.append({"ok": False, "what": f"train: {error}"})
        return {}
    checks += [{"ok": True, "what": f"train: {line}"} for line in said]
    return found


def _machine(recipe: Recipe, stages: list[dict[str, Any]], run_dir: Path, checks: list[dict[str, Any]]) -> None:
    redone = [stage for stage in stages if stage["redo"] and stage["seconds"] is not None]
    memory = max((stage["memory_mb"] for stage in redone), default=0.0)
    disk = sum(stage["disk_mb"] for stage in redone)
    have = psutil.virtual_memory().available / 1e6
    what = f"memory: about {memory:,.0f} MB needed, {have:,.0f} MB available"
    if memory > have:
        stage = max(redone, key=lambda stage: stage["memory_mb"])["name"]
        what += f" ({stage}): " + (
            "lower train.pass_tokens or data.max_length, or set train.gradient_checkpointing=true"
            if stage == "train"
            else "close other programs, run this stage on a larger machine, or take a smaller model"
        )
    checks.append({"ok": memory <= have, "what": what})
    for where, needed in ((run_dir, disk), (home(), 0.0)):
        at = existing(where)
        if not os.access(at, os.W_OK):
            checks.append({"ok": False, "what": f"no permission to write in {at}"})
        free = shutil.disk_usage(at).free / 1e6
        checks.append(
            {
                "ok": needed <= free,
                "what": f"disk: about {ceil(needed):,} MB needed, {free:,.0f} MB free for {where}",
            }
        )
