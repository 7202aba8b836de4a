"""What is predicted of a model: each group of matrices on each candidate, and the model builder's own rounding.

The builder rounds every matrix and the head to nearest, in blocks of 32 without zero points and with 32-bit scales. A
tied embedding shares the head's codes in 4 bits; any other embedding stays float32. All positions of a prompt go through
its head, and its graph has rotary angles for the whole context of the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgetune import progress
from edgetune.export.quantize.auto_choice import Option, Rest, Unit
from edgetune.export.quantize.auto_cost import MANY, Costs, Timed, timed
from edgetune.export.quantize.auto_sensitivity import Measured, Sensitivity
from edgetune.export.quantize.auto_time import About
from edgetune.export.quantize.calibrate import fitted
from edgetune.export.quantize.grid import Grid
from edgetune.export.quantize.plan import EMBEDDING, HEAD
from edgetune.files import read_json

BUILDER = {"model builder int4": Grid(4, 32), "model builder int8": Grid(8, 32)}
_LEAST, _MOST = 0.2, 5.0  # how far divergences are scaled at most
_FILES_A_LAYER = 8_000  # bytes of a graph
_GRAPHS = 2  # the second one takes up prompts that were kept; the builder has none
_OTHER_FILES = 16_000  # bytes: configuration, golden prompts, card, manifest
_SCALE = 4  # bytes of the builder's
_METHODS = {"gptq": "", "least_error": ", least error"}  # as labels say them


def guessed(units: Sequence[Measured], candidates: Mapping[str, Grid], heads: Sequence[str]) -> list[Measured]:
    """Groups with divergences that stand for measured ones where only sizes and speeds are asked for: a bit less makes an
    error four times larger, a larger block a little."""
    return [
        Measured(
            unit.name,
            unit.shapes,
            {
                name: sum(
                    rows * columns * (1 + candidates[name].block(columns) / 1e4)
                    for rows, columns in unit.shapes.values()
                )
                * 4.0 ** -candidates[name].bits
                for name in (heads if _is_end(unit) else candidates)
            },
        )
        for unit in units
    ]


def smallest(groups: Sequence[dict[str, tuple[int, int]]], candidates: Mapping[str, Grid]) -> int:
    """Bytes of all matrices on the candidate that has the fewest."""
    return min(sum(size(group, grid) for group in groups) for grid in candidates.values())


def all_timed(groups: Sequence[dict[str, tuple[int, int]]], candidates: Mapping[str, Grid]) -> list[Timed]:
    """Every product that predictions need, without repetition."""
    own = [one for grid in candidates.values() for group in groups for one in timed(group, grid)]
    builder = [one for grid in BUILDER.values() for group in groups for one in timed(group, grid, whole=True)]
    return list(dict.fromkeys([*own, *builder]))


def measure_costs(costs: Costs, about: About, wanted: Sequence[Timed]) -> None:
    """Time what is not known yet."""
    left = [one for one in wanted if not costs.knows(one)]
    if left:
        with progress.task("measure what products cost", len(left)) as bar:
            for one in left:
                costs.seconds(*one)
                bar.advance(1)
    costs.rest(about.shape, 1), costs.rest(about.shape, MANY)


def scales(found: Sensitivity, candidates: Mapping[str, Grid]) -> dict[str, float]:
    """By how much the divergences of single groups are to be scaled to add up to that of all of them together."""
    scaled = {}
    for name in candidates:
        alone = sum(unit.kld[name] for unit in found.units if not _is_end(unit))
        scaled[name] = min(_MOST, max(_LEAST, found.together[name] / alone)) if alone > 0 else 1.0
    return scaled


def options(
    units: Sequence[Measured], candidates: Mapping[str, Grid], costs: Costs, scaled: Mapping[str, float]
) -> list[Unit]:
    """Each group with what is predicted of it on each candidate."""
    return [
        Unit(unit.name, tuple(_option(unit, name, candidates[name], costs, scaled.get(name, 1.0)) for name in unit.kld))
        for unit in units
    ]


def _option(unit: Measured, name: str, grid: Grid, costs: Costs, scale: float) -> Option:
    grids = {part: fitted(part, grid, columns) for part, (_, columns) in unit.shapes.items()}
    method = unit.methods.get(name)
    return Option(
        name + _METHODS[method or "gptq"],
        grids,
        unit.kld[name] * (1.0 if _is_end(unit) else scale),
        size(unit.shapes, grid),
        *costs.token(unit.shapes, grid),
        method,
    )


def size(shapes: dict[str, tuple[int, int]], grid: Grid) -> int:
    """Bytes of a group's matrices in the graph."""
    return sum(fitted(name, grid, columns).size(rows, columns) for name, (rows, columns) in shapes.items())


def rest(about: About, merged: Path, context: int, costs: Costs) -> Rest:
    """What all choices have in common."""
    return Rest(_beside(about, merged, context), costs.rest(about.shape, 1), costs.rest(about.shape, MANY) / MANY)


def builder_points(found: Sensitivity, about: About, merged: Path, costs: Costs) -> list[dict[str, Any]]:
    """What is predicted of the model builder's own rounding, as `read_points` gives points."""
    points = []
    files = _beside(about, merged, about.longest, 1)
    tied = not any(EMBEDDING in unit.shapes for unit in found.units)
    for name, grid in BUILDER.items():
        decode, prefill = costs.rest(about.shape, 1), costs.rest(about.shape, MANY) / MANY
        bytes_ = files
        for unit in found.units:
            alone, together = costs.token(unit.shapes, grid, whole=True)
            decode, prefill = decode + alone, prefill + together
            bytes_ += sum(_of_builder(part, *shape, grid, tied) for part, shape in unit.shapes.items())
        points.append(
            {
                "name": f"{name}, predicted",
                "size_mb": round(bytes_ / 1e6, 3),
                "kld_mean": round(found.together[name], 6),
                "decode_tokens_per_s": round(1 / decode, 2),
                "prefill_tokens_per_s": round(1 / prefill, 1),
            }
        )
    return points


def _of_builder(name: str, rows: int, columns: int, grid: Grid, tied: bool) -> int:
    blocks = grid.blocks(columns)
    codes = rows * blocks * (grid.block_size * grid.bits // 8 + _SCALE)
    floats = 4 * rows * columns
    if name == EMBEDDING:
        return floats
    return codes + (floats if name == HEAD and tied and grid.bits == 8 else 0)  # its lookups know 4 bits only


def _beside(about: About, merged: Path, context: int, graphs: int = _GRAPHS) -> int:
    """Bytes of norms, of angles (cosines and sines of half a head), of the tokenizer and of small files."""
    words = read_json(merged / "tokenizer.json") if (merged / "tokenizer.json").is_file() else {}
    files = len(json.dumps(words, ensure_ascii=False, separators=(",", ":")).encode())  # as the export writes it
    shape = about.shape
    floats = 4 * shape.hidden * (2 * shape.layers + 1)
    return files + 4 * context * shape.head_size + floats + graphs * _FILES_A_LAYER * (shape.layers + 1) + _OTHER_FILES


def _is_end(unit: Measured) -> bool:
    return bool(set(unit.shapes) & {HEAD, EMBEDDING})
