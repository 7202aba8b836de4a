"""What an export takes, known from the shapes of the weights before it starts.

`benchmarks/README.md` says how far it is off.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from edgetune.errors import InputError
from edgetune.export.quantize.plan import EMBEDDING, part_names
from edgetune.files import require_space
from edgetune.models.check import check_safetensors, weight_files
from edgetune.runtime.hardware import available_memory, gflops

if TYPE_CHECKING:
    from edgetune.export.targets import Target

_BYTES_A_WEIGHT = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.2, "int4": 0.7}  # as the model builder stores them
_PROCESS = 0.6e9  # bytes of one that has torch and transformers
_MATRIX = 5.5  # float32 copies of the largest matrix while it is rounded to nearest
_SEARCHED = 8.0  # and with GPTQ
_BUILDER = 1.4  # float32 copies of all weights in the builder, when it rounds them itself
_LOADED = 1.7  # artifacts in memory while one is loaded: its pages, and weights in the kernels' own order
_LAYER = re.compile(r"\.layers\.\d+\.")
_WORDS = 5e7  # bytes of tokenizer, configuration and graph
_START_S = 20.0  # imports, the builder's start, the contract, a first answer
_ROUNDED_A_S = 40e6  # weights that are rounded to nearest and written
_BUILT_A_S = 150e6  # weights that the builder puts into its graph
_PASSES = (
    8.0  # forward passes of a calibrated layer, of short rows: as far as each group of matrices, whole, and not rounded
)
_SEARCHED_A_S = 0.6e6  # weights of 4 bits whose scales, zero points and codes GPTQ looks for
_LEAST_GFLOPS = 20.0  # other programs make the short measurement slower than the work will be
_FITS = 10.0  # products of a matrix with its Hessian in GPTQ, in floating-point operations a pair


@dataclass(frozen=True)
class Needs:
    """What an export takes.

    Attributes:
        seconds: from its start to its end; what `method: auto` measures comes on top.
        memory: bytes, all of its processes together.
        disk: bytes while it works.
        size: bytes of the artifact.
        parameters: of the model.
    """

    seconds: float
    memory: float
    disk: float
    size: float
    parameters: int


@dataclass
class _Shapes:
    """Parameters, the largest matrix and the largest layer of a model, in weights, and its matrices' shapes."""

    parameters: int = 0
    largest: int = 0
    layer: int = 0
    matrices: list[tuple[str, int, int]] = field(default_factory=list)


def needs(folder: Path, target: Target, *, steps: int = 0) -> Needs:
    """Estimate an export.

    Args:
        folder: transformers folder of the model, or of another one of its shape.
        target: the device profile.
        steps: of healing afterwards.

    Raises:
        InputError: the folder has no weights, or one of its files is broken.
    """
    found = _shapes(folder)
    floats, section = 4.0 * found.parameters, target.quantization
    if section is None:
        size = found.parameters * _BYTES_A_WEIGHT[target.precision]
        copies = _BUILDER if target.precision in ("int4", "int8") and not target.static else 2.0
        seconds = _START_S + 2 * found.parameters / _BUILT_A_S
        memory = 2 * _PROCESS + copies * floats
        return Needs(seconds, memory, size + found.parameters + _WORDS, size, found.parameters)
    plan = section.plan()
    size = sum(plan.grid(name).size(rows, columns) for name, rows, columns in found.matrices)
    calibration = section.calibration_tokens if plan.calibrated else 0
    operations, searched = 0.0, 0
    for name, rows, columns in found.matrices if plan.calibrated else ():
        operations += _PASSES * 2 * calibration * rows * columns
        if plan.method == "gptq" and plan.grid(name).bits == 4 and name != EMBEDDING:
            operations += _FITS * rows * columns * columns
            searched += rows * columns
    columns = max((columns for _, _, columns in found.matrices), default=0)
    memory = max(
        _PROCESS
        + 4 * max((_SEARCHED if searched else _MATRIX) * found.largest, 2 * found.layer)
        + calibration * 18 * columns
        + (28 * columns**2 if plan.method == "gptq" else 0),
        2 * _PROCESS + 2 * size,  # the builder maps the checkpoint and makes the graph's weights
        _PROCESS + _LOADED * size,
        _PROCESS + 1.5 * floats if steps else 0,
    )
    seconds = (
        _START_S
        + found.parameters * (1 / _ROUNDED_A_S + 1 / _BUILT_A_S)
        + operations / max(gflops(), _LEAST_GFLOPS) / 1e9
        + searched / _SEARCHED_A_S
    )
    return Needs(seconds, memory, 3 * size + _WORDS, size, found.parameters)


def require_room(found: Needs, where: Path, *, memory: float | None = None, before: float = 0) -> None:
    """Refuse an export that this machine has no memory or disk for.

    Args:
        found: what it takes.
        where: a folder on the disk that the artifact is written to.
        memory: bytes that can be used; what is available now when None.
        before: bytes that are written to that disk before the export.

    Raises:
        InputError: too little of either.
    """
    require_space(where, int(found.disk + before), "the export")
    have = available_memory() if memory is None else memory
    if found.memory > have:
        raise InputError(
            f"the export needs about {found.memory / 1e6:,.0f} MB of memory, {have / 1e6:,.0f} MB are there",
            where="export.target",
            fix="close other programs, take a larger machine, or a target that holds a layer at a time: cpu-int4, cpu-int8",
        )


def _shapes(folder: Path) -> _Shapes:
    found, layers = _Shapes(), dict[str, int]()
    for file in weight_files(folder):
        for name, one in check_safetensors(file).items():
            size = prod(one["shape"])
            found.parameters += size
            layer = _LAYER.search(name)
            if layer:
                layers[layer[0]] = layers.get(layer[0], 0) + size
            if len(one["shape"]) == 2:
                rows, columns = one["shape"]
                parts = part_names(name.removesuffix(".weight"))
                found.matrices += [(part, rows // len(parts), columns) for part in parts]
                found.largest = max(found.largest, size)
    found.layer = max(layers.values(), default=0)
    return found
