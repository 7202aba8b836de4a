"""Time, peak memory and disk of each stage: training from a calibration on this machine, the rest from the model's size.

The other stages are loading, saving and forward passes; their factors (seconds to import and load, copies of the weights)
were fitted on SmolLM2-135M on two AVX-512 cores. `benchmarks/README.md` says how far all of it is off.
"""

from __future__ import annotations

import gc
import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import psutil

from edgetune.models import Base
from edgetune.recipe import Recipe, TrainSection

if TYPE_CHECKING:
    from edgetune.export.quantize.plan import Plan
    from edgetune.export.targets import Target
    from edgetune.train.calibrate import Calibration

_BYTES_A_TOKEN = 5.3  # of a JSON Lines file of English chat rows
_LOAD_MB_S = 250.0  # reading weights and laying them out
_IMPORT_S = 3.0
_HEAD_MB = 80.0  # logits and their slopes, a piece at a time
_SPARE = 1.1  # what the allocator holds beside what is used

# What of the recipe's `train` decides how long a pass takes and what it keeps, beside its tokens.
_MEASURED = (
    "method",
    "rank",
    "dropout",
    "target_modules",
    "modules_to_save",
    "initialization",
    "neftune_alpha",
    "packing",
    "quantization_aware",
    "distillation",
    "optimizer",
    "dtype",
    "threads",
)

_bases: dict[Any, Base] = {}  # by path: what is cached by must be hashable
_grids: dict[str, Plan | None] = {}  # by their words, likewise

Estimates = dict[str, dict[str, float]]


def estimates(
    recipe: Recipe, base: Base, tokens: dict[str, int], processes: int = 1, here: int = 1
) -> tuple[Estimates, list[str]]:
    """Estimate every stage of a run.

    Args:
        recipe: the recipe.
        base: the base model, on this machine.
        tokens: `train`, `validation` (tokens of each side), `rows` (training rows), `longest` (tokens of a row).
        processes, here: that train, in all and on this machine, whose memory is estimated.

    Returns:
        for each stage `seconds`, `memory_mb` (peak resident), `disk_mb`; and what was chosen for training, in words.

    Raises:
        InputError: training cannot fit, or the method does not fit the model.
    """
    train, said, parameters, forward_s = _train(recipe, base, tokens, processes, here)
    return {**_others(recipe, base, tokens, parameters, forward_s), "train": train}, said


def held_bytes(section: TrainSection, found: Calibration, kept: float, processes: int) -> float:
    """Bytes that one of `processes` holds while it trains: weights, gradients, optimizer state and `kept` of activations."""
    from edgetune.train.memory import optimizer_bytes, weight_bytes

    weights = weight_bytes(section, found.weight_bytes, found.live_bytes, found.parameters, processes)
    return weights + optimizer_bytes(section, found.trainable, processes) + _SPARE * kept


def _train(
    recipe: Recipe, base: Base, tokens: dict[str, int], processes: int, here: int
) -> tuple[dict[str, float], list[str], int, float]:
    from edgetune.export.needs import needs
    from edgetune.export.targets import target_for, trained_through
    from edgetune.train.memory import choose, room
    from edgetune.train.schedule import DEFAULT_PASS_TOKENS, DEFAULT_ROWS

    section = recipe.train
    row = max(1, round(tokens["train"] / max(1, tokens["rows"])))
    a_step = section.gradient_accumulation * (section.batch_tokens or (section.batch_size or DEFAULT_ROWS) * row)
    a_share = max(row, a_step // processes)
    measured = min(a_share, section.pass_tokens or DEFAULT_PASS_TOKENS)
    _bases[base.path] = base
    decides = section.model_dump_json(include=set(_MEASURED))
    through = trained_through(recipe)
    _grids[str(through)] = through
    found = _calibration(decides, base.path, row, measured, recipe.model.trust_remote_code, str(through))
    space = room(psutil.virtual_memory().available / here, held_bytes(section, found, 0.0, processes))
    fit = choose(section, lambda: found.once, lambda: found.twice, space, tokens["longest"])
    kept = (found.twice if fit.checkpointing else found.once).of(min(fit.pass_tokens, a_share), tokens["longest"])
    again = 4 / 3 if fit.checkpointing else 1.0  # forward, forward again and backward, in place of forward and backward
    learned = section.max_steps * a_step if section.max_steps else section.epochs * tokens["train"]
    validated = (1 + section.evaluations) * tokens["validation"]
    file_mb = _file_mb(base)
    answers = 2 * section.samples * section.sample_tokens
    seconds = (
        _IMPORT_S
        + file_mb / _LOAD_MB_S
        + (learned * found.step_s * again + validated * found.forward_s) / found.tokens * here / processes
        + answers * (found.weight_bytes / 2e10 + 0.02)
        + (needs(base.path, target_for(recipe)).seconds if through else 0.0)  # the codes to begin with
    )
    working = held_bytes(section, found, kept, processes)
    loading = found.weight_bytes + 1e6 * file_mb  # the file's pages count while it is copied; each process loads it all
    said = [
        f"{found.trainable:,} of {found.parameters:,} parameters are trained, about "
        f"{found.tokens / found.step_s / again:,.0f} tokens/s, {fit.pass_tokens} tokens a pass"
    ]
    if fit.why:
        said.append(fit.why)
    if processes > 1:
        said.append(
            f"{processes} processes, {here} of them here: each holds {working / 1e6:,.0f} MB while it trains and "
            f"{loading / 1e6:,.0f} MB while it loads the model"
        )
    told = {
        "seconds": seconds,
        "memory_mb": here * (found.runtime_mb + _HEAD_MB + max(working, loading) / 1e6),
        "disk_mb": 3 * 12 * found.trainable / 1e6,  # the adapter and two checkpoints with the optimizer's state
    }
    return told, said, found.parameters, found.forward_s / found.tokens


@lru_cache(maxsize=64)
def _calibration(section: str, path: Any, row: int, tokens: int, trust_remote_code: bool, grids: str) -> Any:
    """Calibrations of this process by what they depend on: the points of a sweep often share one."""
    from edgetune.train.calibrate import calibrate

    train = TrainSection.model_validate_json(section)
    found = calibrate(train, _bases[path], row, tokens, trust_remote_code, _grids[grids])
    gc.collect()
    return found


def _others(recipe: Recipe, base: Base, tokens: dict[str, int], parameters: int, forward_s: float) -> Estimates:
    from edgetune.export.needs import needs
    from edgetune.export.targets import target_of
    from edgetune.runtime.hardware import bandwidth_gb_s

    weights_mb = 4 * parameters / 1e6
    load_s = _IMPORT_S + weights_mb / _LOAD_MB_S
    runtime_mb = psutil.Process().memory_info().rss / 1e6
    target = target_of(recipe.export)
    export = needs(base.path, target, steps=recipe.export.heal.steps)
    artifact_mb = export.size / 1e6
    compared = min(tokens["validation"], recipe.verify.rows * max(tokens["longest"], 1))
    compared += 8 * 8 * recipe.verify.golden_tokens
    decode_s = artifact_mb / 1e3 / bandwidth_gb_s() * 2 + 0.002
    rounds = recipe.bench.warmup + recipe.bench.repetitions
    both = tokens["train"] + tokens["validation"]
    return {
        "data": {"seconds": _IMPORT_S + both / 3e5, "memory_mb": runtime_mb, "disk_mb": both * _BYTES_A_TOKEN / 1e6},
        "merge": {"seconds": 2 * load_s, "memory_mb": runtime_mb + 2 * weights_mb, "disk_mb": weights_mb},
        "export": {
            "seconds": export.seconds + _measuring(target, base, tokens["train"]),
            "memory_mb": export.memory / 1e6,
            "disk_mb": export.disk / 1e6,
        },
        "verify": {
            "seconds": load_s + 6 * forward_s * compared,
            "memory_mb": runtime_mb + weights_mb + 1.5 * artifact_mb,
            "disk_mb": 0.1,
        },
        "bench": {
            "seconds": 2 + rounds * (2 * forward_s * recipe.bench.prompt_tokens + recipe.bench.new_tokens * decode_s),
            "memory_mb": 100 + 1.2 * artifact_mb,
            "disk_mb": 0.1,
        },
    }


def _measuring(target: Target, base: Base, tokens: int) -> float:
    """Seconds that a target which chooses its grids by limits measures before it exports, where nothing was measured yet."""
    from edgetune.export.quantize.auto import measuring

    section = target.quantization
    if section is None or section.method != "auto":
        return 0.0
    return measuring(base.path, section.auto, min(section.calibration_tokens, tokens))


def _file_mb(base: Base) -> float:
    return math.fsum(path.stat().st_size for path in base.path.glob("*.safetensors")) / 1e6
