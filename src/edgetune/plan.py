"""What a run would do, before it does it: stages, time, memory, disk, and the checks. Nothing in the run is written."""

from __future__ import annotations

import json
import os
import shutil
from math import ceil
from pathlib import Path
from typing import Any

import psutil

from edgetune.data.examine import train_files
from edgetune.errors import EdgetuneError, InputError, require_extra
from edgetune.files import existing, home
from edgetune.models import Base, local
from edgetune.pipeline import Pipeline
from edgetune.recipe import Recipe
from edgetune.recipe_file import LoadedRecipe
from edgetune.run import STAGES

_BYTES_A_TOKEN = 5.3  # of a JSON Lines file of English chat rows; used only while the tokenizer is not here
_RUNTIME_MB = 600.0  # Python with torch and transformers


def plan(loaded: LoadedRecipe, *, first: str | None, until: str | None, force: bool) -> dict[str, Any]:
    """Plan a run.

    Args:
        loaded: the recipe.
        first, until, force: as in `Pipeline.run`.

    Returns:
        `recipe` (resolved), `run`, `stages` (each with `name`, `redo`, `why` and estimates: `seconds`, `memory_mb`,
        `disk_mb`, None where the base model is not on this machine yet), `checks` (`ok`, `what`).
    """
    recipe = loaded.recipe
    checks: list[dict[str, Any]] = []
    installed = _installed(checks)
    base = _base(recipe, checks) if installed else None
    tokens = _tokens(recipe, base, checks)
    estimates = _estimates(recipe, base, tokens) if base else {}
    pipeline = Pipeline(loaded, base)
    stages = []
    upstream: str | None = None
    forced = force
    for stage in STAGES[: STAGES.index(until or STAGES[-1]) + 1]:
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
        stages.append({"name": stage, "redo": why is not None, "why": why, **estimates.get(stage, _UNKNOWN)})
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


def _installed(checks: list[dict[str, Any]]) -> bool:
    try:
        for extra in ("train", "export"):
            require_extra(extra)
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


def _tokens(recipe: Recipe, base: Base | None, checks: list[dict[str, Any]]) -> dict[str, int]:
    """Tokens and rows of both sides: counted where the tokenizer is here, else from the size of the files."""
    missing = [str(path) for path in train_files(recipe.data) if not path.is_file()]
    if isinstance(recipe.data.validation, str) and not Path(recipe.data.validation).is_file():
        missing.append(recipe.data.validation)
    if missing:
        checks.append({"ok": False, "what": f"no such data file: {', '.join(missing)}"})
        return {"train": 0, "validation": 0, "longest": 0}
    if base is None:
        size = sum(path.stat().st_size for path in train_files(recipe.data))
        return {"train": int(size / _BYTES_A_TOKEN), "validation": 0, "longest": 0}
    from edgetune.data.check import check

    try:
        checked = check(recipe.data, seed=recipe.seed, model=recipe.model, base=base)
    except EdgetuneError as error:
        checks.append({"ok": False, "what": f"data: {error}"})
        return {"train": 0, "validation": 0, "longest": 0}
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
    return {**told["tokens"], "longest": told["length"]["train"]["max"]}


def _estimates(recipe: Recipe, base: Base, tokens: dict[str, int]) -> dict[str, dict[str, float]]:
    """Rough times (s), peak memory (MB) and disk (MB) of each stage, from the model's shape and this processor's speed.

    FLOPs: 2 a parameter and token forward, 4 forward and backward past frozen weights. The other factors (share of the
    matrix rate that is reached, bytes of activations a token, time to load) fit SmolLM2-135M on two AVX-512 cores.
    """
    from edgetune.export.targets import load_target
    from edgetune.runtime.hardware import bandwidth_gb_s, gflops
    from edgetune.train.method import base_dtype

    config = json.loads((base.path / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config") or config
    layers, hidden = config.get("num_hidden_layers", 24), config.get("hidden_size", 1024)
    inner, vocabulary = config.get("intermediate_size") or 4 * hidden, config.get("vocab_size", 32000)
    parameters = layers * (2.6 * hidden * hidden + 3 * hidden * inner) + vocabulary * hidden * (
        1 if config.get("tie_word_embeddings") else 2
    )
    half = str(base_dtype(recipe.train)).endswith("bfloat16")
    rate = gflops() * 1e9 * (1.1 if half else 0.6)
    weights_mb = parameters * 4 / 1e6
    load_s = 4 + weights_mb / 150
    section = recipe.train
    passes = (
        section.epochs
        if section.max_steps is None
        else (
            section.max_steps
            * (section.batch_size or 8)
            * section.gradient_accumulation
            * (tokens["longest"] / 2)
            / max(tokens["train"], 1)
        )
    )
    adapter = 2 * layers * section.rank * (4.6 * hidden + 3 * (hidden + inner))
    held = max(section.pass_tokens or 2048, tokens["longest"])  # tokens in flight
    activations = held * layers * 5 * (10 * hidden + 6 * inner) * (1 if half else 1.4) + 0.4 * held * vocabulary * 14
    precision = load_target(recipe.export.target).precision
    artifact_mb = (
        {"fp32": 4.0, "int8": 1.15 + 4 * vocabulary * hidden / parameters, "int4": 0.7}[precision] * parameters / 1e6
    )
    verify_tokens = (
        min(tokens["validation"], recipe.verify.rows * max(tokens["longest"], 1)) + 8 * recipe.verify.golden_tokens * 8
    )
    decode_s = artifact_mb / 1e3 / bandwidth_gb_s() * 2 + 0.002
    rounds = recipe.bench.warmup + recipe.bench.repetitions
    forward = 2 * parameters / rate
    return {
        "data": {
            "seconds": 3 + (tokens["train"] + tokens["validation"]) / 3e5,
            "memory_mb": _RUNTIME_MB,
            "disk_mb": (tokens["train"] + tokens["validation"]) * _BYTES_A_TOKEN / 1e6,
        },
        "train": {
            "seconds": load_s
            + 2 * forward * tokens["train"] * passes
            + forward * tokens["validation"] * (section.evaluations + 1) * 2,
            "memory_mb": _RUNTIME_MB + weights_mb / (2 if half else 1) + (16 * adapter + activations) / 1e6,
            "disk_mb": 8 * adapter / 1e6,
        },
        "merge": {"seconds": 2 * load_s, "memory_mb": _RUNTIME_MB + 2 * weights_mb, "disk_mb": weights_mb},
        "export": {"seconds": 2 * load_s, "memory_mb": _RUNTIME_MB + 2.6 * weights_mb, "disk_mb": artifact_mb},
        "verify": {
            "seconds": load_s + 4 * forward * verify_tokens,
            "memory_mb": _RUNTIME_MB + weights_mb + 1.5 * artifact_mb,
            "disk_mb": 0.1,
        },
        "bench": {
            "seconds": 2 + rounds * (1.5 * forward * recipe.bench.prompt_tokens + recipe.bench.new_tokens * decode_s),
            "memory_mb": 100 + 1.2 * artifact_mb,
            "disk_mb": 0.1,
        },
    }


def _machine(recipe: Recipe, stages: list[dict[str, Any]], run_dir: Path, checks: list[dict[str, Any]]) -> None:
    redone = [stage for stage in stages if stage["redo"] and stage["seconds"] is not None]
    memory = max((stage["memory_mb"] for stage in redone), default=0.0)
    disk = sum(stage["disk_mb"] for stage in redone)
    have = psutil.virtual_memory().available / 1e6
    what = f"memory: about {memory:,.0f} MB needed, {have:,.0f} MB available"
    if memory > have:
        what += "; lower train.batch_size (and raise train.gradient_accumulation) or data.max_length"
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
