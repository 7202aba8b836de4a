"""`method: auto`: measure what each layer bears and what each product costs here, and choose grids by limits.

What was measured is kept in `home()/auto/`, by the model's hashes, the rows, the candidates and the versions: other
limits, or a run that was interrupted, go on from there.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune import progress
from edgetune.errors import InputError
from edgetune.export.quantize.auto_choice import Choice, Option, Point, Rest, Unit, Wanted, as_json, describe
from edgetune.export.quantize.auto_cost import MANY, Costs, Shape, products
from edgetune.export.quantize.auto_sensitivity import Measured, Sensitivity, measure
from edgetune.export.quantize.calibrate import fitted
from edgetune.export.quantize.grid import Grid
from edgetune.export.quantize.plan import EMBEDDING, HEAD, Plan
from edgetune.files import HashCache, digest, home, read_json, write_json
from edgetune.recipe import AutoSection

if TYPE_CHECKING:
    from edgetune.data.batch import Encoded

CANDIDATES = {
    "int4 block 32": Grid(4, 32, True),
    "int4 block 64": Grid(4, 64, True),
    "int8": Grid(8, 64),
    "int8 activations": Grid(8, activations="int8"),
}
HEADS = ("int4 block 32", "int8")  # a lookup has no activations, and a head's few rows gain nothing by them
_FORMAT = 3  # of what is kept
_LONGEST = 128  # tokens of a held-out row: rows differ more than the places in one
_LEAST, _MOST = 0.2, 5.0  # how far divergences are scaled at most
_SECONDS_A_CODE = 0.4e-6  # of GPTQ, a weight, on a core of 90 * 10^9 operations a second
_SECONDS_A_COST = 1.0  # of a product: its graphs are made, and run for 0.4 s
_FILES_A_LAYER = 8_000  # bytes of a graph
_OTHER_FILES = 16_000  # bytes: configuration, golden prompts, card, manifest
# Shares of the limits that the choice goes by. SmolLM2 had 1.25 times the divergence on rows that it was not trained on.
_IN_HAND = {"kld_mean": 0.75, "size_mb": 0.998}


@dataclass(frozen=True)
class Found:
    """What `auto` came to.

    Attributes:
        plan: a grid for each matrix, by its full name.
        report: `picked`, `groups`, `front`, `limits`, `scaled` (by candidate), `kept` (where the measurements lie).
    """

    plan: Plan
    report: dict[str, Any]


def find(
    merged: Path,
    wanted: AutoSection,
    calibration: Sequence[Encoded],
    held_out: Sequence[Encoded],
    context: int,
    report: Path | None,
    *,
    trust_remote_code: bool = False,
) -> Found:
    """Choose a grid for each matrix of a model.

    Args:
        merged: transformers folder.
        wanted: the limits.
        calibration: rows to calibrate on.
        held_out: other rows, to measure on; see `split`.
        context: tokens of the artifact.
        report: existing folder that gets front.png, or None.

    Raises:
        InputError: nothing meets the limits, the model has no such layers, or a file of measured points is broken.
    """
    from edgetune.export.quantize.auto_plot import front_table, plot, read_points
    from edgetune.runtime.hardware import default_threads

    others = read_points(Path(wanted.points)) if wanted.points else []
    config = _config(merged)
    candidates = _candidates()
    kept = _folder(merged, candidates, calibration, held_out)
    _say_time(config, held_out, calibration, kept)
    threads, started = default_threads(), time.monotonic()
    found = measure(
        merged,
        candidates,
        [name for name in HEADS if name in candidates],
        [row.ids for row in calibration],
        held_out,
        kept,
        trust_remote_code=trust_remote_code,
    )
    choice, scaled = _choice(found, candidates, config, merged, context, threads)
    front = choice.front()
    point = _pick(choice, Wanted(**wanted.limits))
    progress.say(front_table(choice, front, point, others))
    progress.say(f"auto: predicted {describe(point)}, on {threads} threads")
    told: dict[str, Any] = {
        "limits": {name: value for name, value in wanted.limits.items() if value is not None},
        "picked": as_json(point),
        "groups": {unit.name: unit.options[at].label for unit, at in zip(choice.units, point.picks, strict=True)},
        "front": [as_json(one) | {"grids": counts(choice, one)} for one in front],
        "scaled": {name: round(value, 3) for name, value in scaled.items()},
        "threads": threads,
        "seconds": round(time.monotonic() - started, 1),
    }
    write_json(kept / "front.json", told)
    plot(choice.all_points(), front, point, others, kept / "front.png")
    if report is not None:
        shutil.copyfile(kept / "front.png", report / "front.png")
    progress.say(f"auto: the front is drawn in {kept / 'front.png'}")
    grids = {
        name: grid
        for unit, at in zip(choice.units, point.picks, strict=True)
        for name, grid in unit.options[at].grids.items()
    }
    return Found(Plan(Grid(4, 32, True), grids, "gptq", most_error=float("inf")), told)


def _pick(choice: Choice, limits: Wanted) -> Point:
    """What the limits want, with something in hand where that can be: the gate reads other rows than these, and the files
    around the weights are known to some KB only. Raises InputError: nothing keeps the limits."""
    least = {name: share * value for name, share in _IN_HAND.items() if (value := getattr(limits, name)) is not None}
    with contextlib.suppress(InputError):
        return choice.pick(replace(limits, **least))
    return choice.pick(limits)


def counts(choice: Choice, point: Point) -> dict[str, int]:
    """How many units of a point have each candidate."""
    found: dict[str, int] = {}
    for unit, at in zip(choice.units, point.picks, strict=True):
        label = unit.options[at].label
        found[label] = found.get(label, 0) + 1
    return dict(sorted(found.items()))


def _candidates() -> dict[str, Grid]:
    """Those whose kernels this processor computes right."""
    from edgetune.runtime.kernels import KERNELS, wrong

    found = wrong()
    bad = {(one.bits, one.zero_points, one.activations) for one in KERNELS if one.name in found}
    candidates = {
        name: grid for name, grid in CANDIDATES.items() if (grid.bits, grid.zero_points, grid.activations) not in bad
    }
    if len(candidates) < len(CANDIDATES):
        left_out = ", ".join(name for name in CANDIDATES if name not in candidates)
        progress.say(f"auto: this processor computes {left_out} wrong, which is left out")
    if not any(name in candidates for name in HEADS):
        raise InputError(
            "this processor and this build of ONNX Runtime compute all kernels wrong that `auto` chooses from",
            where="export.target",
            fix="update onnxruntime, or choose a target without them (cpu-int8)",
        )
    return candidates


def split(rows: Sequence[Encoded], tokens: int) -> tuple[Sequence[Encoded], list[Encoded]]:
    """Training rows to calibrate on, and the last ones to measure on: as many as have so many tokens with loss, a quarter
    of all at most, each cut to 128 tokens, or to the first 64 with loss where these come later.

    Raises:
        InputError: these have no tokens with loss.
    """
    from edgetune.data.batch import cut

    found: list[Encoded] = []
    total = taken = 0
    for row in reversed(rows[-max(1, len(rows) // 4) :]):
        if total >= tokens:
            break
        taken += 1
        begins = next((at for at, learned in enumerate(row.learned) if learned and at), None)
        if begins is not None:
            short = cut(row, max(_LONGEST, begins + _LONGEST // 2))
            found.append(short)
            total += sum(short.learned[1:])
    if not found:
        raise InputError("no training row has tokens that carry loss to measure on", fix="give other rows (`--data`)")
    return rows[: len(rows) - taken] or rows, found


def _folder(
    merged: Path, candidates: dict[str, Grid], calibration: Sequence[Encoded], held_out: Sequence[Encoded]
) -> Path:
    """Where what is measured of this model, with these rows and candidates, is kept."""
    from edgetune.runtime.hardware import versions

    files = HashCache().folder(merged)
    model = {name: one for name, one in files.items() if name.endswith(".safetensors") or name == "config.json"}
    key = digest(
        {
            "format": _FORMAT,
            "model": model,
            "candidates": {name: str(grid) for name, grid in candidates.items()},
            "calibration": [list(row.ids) for row in calibration],
            "held_out": [[list(row.ids), [bool(one) for one in row.learned]] for row in held_out],
            "versions": versions("edgetune", "torch", "transformers"),
        }
    )
    kept = home() / "auto" / key[:16]
    kept.mkdir(parents=True, exist_ok=True)
    return kept


def _costs(threads: int, model_bytes: int) -> Costs:
    """Of this processor, whatever the model."""
    from edgetune.runtime.hardware import cpu, versions

    key = digest({"cpu": cpu(), "threads": threads, **versions("onnxruntime"), "bytes": model_bytes >> 24})
    kept = home() / "auto" / f"costs-{key[:16]}"
    kept.mkdir(parents=True, exist_ok=True)
    return Costs(kept, threads, model_bytes)


def _say_time(config: dict[str, Any], held_out: Sequence[Encoded], calibration: Sequence[Encoded], kept: Path) -> None:
    """Say how long measuring takes, from the model's size and this processor's speed."""
    done = len(list(kept.glob("layer-*.json")))
    left = max(0, config["layers"] - done)
    if (kept / "ends.json").is_file():
        progress.say(f"auto: what was measured before is taken from {kept}")
        return
    tokens, places = sum(len(row.ids) for row in held_out), sum(sum(row.learned) for row in held_out)
    seconds = _seconds(config, tokens, places, sum(len(row.ids) for row in calibration), left)
    again = f", {done} of {config['layers']} layers measured before" if done else ""
    progress.say(
        f"auto: measuring {left} layers takes about {progress.clock(seconds)} where nothing else runs{again}; "
        "interrupted, it goes on from where it was"
    )


def measuring(model: Path, wanted: AutoSection, calibration_tokens: int) -> float:
    """Seconds that measuring a model takes here where nothing of it is known yet, as `edgetune plan` says it.

    Args:
        model: transformers folder, or another one of its shape.
        wanted: says how many tokens layers are measured on.
        calibration_tokens: of the target.

    Raises:
        InputError: its configuration does not say enough.
    """
    config = _config(model)
    shape: Shape = config["shape"]
    kinds = 5  # of products in a layer, and the head; each with every candidate, for a token and for many
    costs = kinds * len(CANDIDATES) * 2 * _SECONDS_A_COST
    tokens = 2 * wanted.tokens  # a row's prompt comes with its answer
    return _seconds(config, tokens, wanted.tokens, calibration_tokens, shape.layers) + costs


def _seconds(config: dict[str, Any], tokens: int, places: int, calibration: int, layers: int) -> float:
    """Of measuring so many layers: tokens that are read, places where distributions are compared, tokens to calibrate on."""
    body, head = config["layer_weights"], config["head_weights"]
    each = 2 * (tokens * body * (layers / 2 + 1) + places * head)
    work = layers * 4 * len(CANDIDATES) * each + 2 * calibration * body * 2 * config["layers"]
    speed = _gflops()
    return float(work / speed / 1e9 + layers * body * 2 * _SECONDS_A_CODE * 90 / speed)


def _gflops() -> float:
    """What torch multiplies here, 10^9 operations a second, by the processor's time: whatever else runs meanwhile."""
    import torch

    size, best = 1024, float("inf")
    matrix = torch.ones(size, size)
    for _ in range(3):
        start = time.process_time()
        matrix @ matrix
        best = min(best, time.process_time() - start)
    return 2 * size**3 / max(best, 1e-6) / 1e9 * torch.get_num_threads()


def _choice(
    found: Sensitivity, candidates: dict[str, Grid], config: dict[str, Any], merged: Path, context: int, threads: int
) -> tuple[Choice, dict[str, float]]:
    scaled = {name: _scale(found, name) for name in candidates}
    sizes = {name: sum(_bytes(unit, grid) for unit in found.units) for name, grid in candidates.items()}
    costs = _costs(threads, min(sizes.values()))
    wanted = [(unit, name) for unit in found.units for name in unit.kld]
    options: dict[str, list[Option]] = {}
    with progress.task("measure what products cost", len(wanted)) as bar:
        for unit, name in wanted:
            options.setdefault(unit.name, []).append(_option(unit, name, candidates[name], scaled[name], costs))
            bar.advance(1)
        rest = _rest(config, merged, context, costs)
    return Choice([Unit(name, tuple(found)) for name, found in options.items()], rest), scaled


def _scale(found: Sensitivity, name: str) -> float:
    """By how much the divergences of single groups are to be scaled to add up to that of all of them together."""
    alone = sum(unit.kld[name] for unit in found.units if not set(unit.shapes) & {HEAD, EMBEDDING})
    return min(_MOST, max(_LEAST, found.together[name] / alone)) if alone > 0 else 1.0


def _option(unit: Measured, name: str, grid: Grid, scale: float, costs: Costs) -> Option:
    grids = {part: fitted(part, grid, columns) for part, (_, columns) in unit.shapes.items()}
    decode = prefill = 0.0
    if EMBEDDING not in unit.shapes:  # a lookup costs next to nothing
        own = next(iter(grids.values()))
        for rows, columns in products(unit.shapes, own):
            decode += costs.seconds(rows, columns, own, 1)
            # of a prompt only the last position goes through the head
            many = 1 if HEAD in unit.shapes else MANY
            prefill += costs.seconds(rows, columns, own, many) / MANY
    scale = 1.0 if set(unit.shapes) & {HEAD, EMBEDDING} else scale
    return Option(name, grids, unit.kld[name] * scale, _bytes(unit, grid), decode, prefill)


def _bytes(unit: Measured, grid: Grid) -> int:
    return sum(fitted(name, grid, columns).size(rows, columns) for name, (rows, columns) in unit.shapes.items())


def _rest(config: dict[str, Any], merged: Path, context: int, costs: Costs) -> Rest:
    shape: Shape = config["shape"]
    words = read_json(merged / "tokenizer.json") if (merged / "tokenizer.json").is_file() else {}
    files = len(json.dumps(words, ensure_ascii=False, separators=(",", ":")).encode())  # as the export writes it
    angles = 4 * context * shape.head_size  # cosines and sines of half a head
    floats = 4 * shape.hidden * (2 * shape.layers + 1)
    size = files + angles + floats + _FILES_A_LAYER * (shape.layers + 1) + _OTHER_FILES
    return Rest(size, costs.rest(shape, 1), costs.rest(shape, MANY) / MANY)


def _config(merged: Path) -> dict[str, Any]:
    """The model's shape, and the weights of a layer and of the head."""
    found = read_json(merged / "config.json")
    found = found.get("text_config") or found
    try:
        hidden, layers, heads = found["hidden_size"], found["num_hidden_layers"], found["num_attention_heads"]
        inner, words = found["intermediate_size"], found["vocab_size"]
    except KeyError as error:
        raise InputError(
            f"its configuration does not say {error}, which `auto` needs",
            where=merged / "config.json",
            fix="choose a target with a fixed choice of grids, such as cpu-int4",
        ) from error
    kv, size = found.get("num_key_value_heads") or heads, found.get("head_dim") or hidden // heads
    return {
        "shape": Shape(layers, hidden, inner, heads, kv, size),
        "layers": layers,
        "layer_weights": hidden * size * (2 * heads + 2 * kv) + 3 * hidden * inner,
        "head_weights": hidden * words,
    }
