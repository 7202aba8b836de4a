"""Whether this processor computes quantized products right: each kernel that artifacts use, against plain arithmetic.

Kernels differ by processor, and some have been wrong on some: int4 with zero points on AVX2 without AVX-512
(microsoft/onnxruntime issue 29853), and 8-bit products that overflow 16 bits where VNNI is absent. `kernels.onnx` holds
one small product of each kind; `edgetune.export.kernel_graph` makes it.
"""

from __future__ import annotations

import functools
import importlib.resources
import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np

COLUMNS, ROWS = 256, 64
# Without VNNI, x86's products of uint8 inputs and int8 weights overflow 16 bits, silently; with this session option ONNX
# Runtime makes such weights uint8 when it loads a graph. It does so with VNNI, too, where that is slower and needless.
RIGHT = {"session.x64quantprecision": "1"}
_VNNI = {"avx512_vnni", "avx_vnni"}
MOST_ERROR = 0.05  # relative, of the outputs' norm; rounding inputs to 8 bits costs under 0.02


@dataclass(frozen=True)
class Kernel:
    """One kind of product.

    Attributes:
        name: as people read it.
        op: ONNX Runtime's operator.
        bits, zero_points, activations, block: of its grid, as in `edgetune.export.quantize.grid.Grid`.
    """

    name: str
    op: str
    bits: int
    zero_points: bool = False
    activations: str = "float"
    block: int = 32


KERNELS = (
    Kernel("int4", "MatMulNBits", 4),
    Kernel("int4 with zero points", "MatMulNBits", 4, True),
    Kernel("int8", "MatMulNBits", 8),
    Kernel("int8 with zero points", "MatMulNBits", 8, True),
    Kernel("int8 activations", "DynamicQuantizeMatMul", 8, False, "int8"),
    Kernel("int4 with zero points, block 64", "MatMulNBits", 4, True, block=64),
    Kernel("int8, block 64", "MatMulNBits", 8, block=64),
)


def weights(kernel: Kernel) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes (ROWS, COLUMNS) uint8, scales (ROWS, blocks) float32 and zeros (ROWS, blocks) uint8 of the test's matrix."""
    import numpy as np

    drawn = np.random.RandomState(KERNELS.index(kernel))
    top, blocks = (1 << kernel.bits) - 1, 1 if kernel.activations == "int8" else COLUMNS // kernel.block
    codes = drawn.randint(0, top + 1, (ROWS, COLUMNS)).astype(np.uint8)
    codes[: ROWS // 4] = top  # with inputs of one sign, sums of pairs are as large as they get
    scales = drawn.uniform(0.01, 0.02, (ROWS, blocks)).astype(np.float32)
    middle = np.full((ROWS, blocks), 1 << (kernel.bits - 1), np.uint8)
    return codes, scales, drawn.randint(0, top + 1, (ROWS, blocks)).astype(np.uint8) if kernel.zero_points else middle


def inputs(count: int) -> np.ndarray:
    """The test's inputs (count, COLUMNS) float32: rows of one sign, near their largest, and rows of both signs."""
    import numpy as np

    drawn = np.random.RandomState(99)
    found = drawn.uniform(-1, 1, (count, COLUMNS))
    found[::2] = drawn.uniform(0.9, 1, found[::2].shape)
    return found.astype(np.float32)


def errors(session: Mapping[str, str] | None = None) -> dict[str, float]:
    """Relative error of each kernel here, the larger of one row and of many, by `Kernel.name`. Takes some milliseconds.

    Args:
        session: session options of ONNX Runtime to load the products with; those that artifacts get here when None.

    Raises:
        OSError: the file that comes with edgetune is missing.
        onnxruntime's own errors: this build lacks one of the operators.
    """
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    graph = importlib.resources.files("edgetune.runtime").joinpath("kernels.onnx").read_bytes()
    if session is None:
        session = RIGHT if overflows() else {}
    for key, value in session.items():
        options.add_session_config_entry(key, value)
    loaded = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    found = dict.fromkeys((kernel.name for kernel in KERNELS), 0.0)
    for count in (1, 48):
        given = inputs(count)
        outputs = loaded.run([kernel.name for kernel in KERNELS], {"inputs": given})
        for kernel, output in zip(KERNELS, outputs, strict=True):
            codes, scales, zeros = (part.astype(np.float64) for part in weights(kernel))
            each = COLUMNS // scales.shape[1]
            matrix = (codes - zeros.repeat(each, 1)) * scales.repeat(each, 1)
            wanted = given.astype(np.float64) @ matrix.T
            error = float(np.linalg.norm(output - wanted) / np.linalg.norm(wanted))
            found[kernel.name] = max(found[kernel.name], error)
    return found


@functools.cache
def overflows() -> bool:
    """Whether products of int8 weights and 8-bit inputs overflow on this processor, unless they are loaded with `RIGHT`.

    A processor that says it has VNNI adds in 32 bits; others are asked by the test, which takes 0.1 s with what it imports.
    """
    from edgetune.runtime.hardware import cpu

    if _VNNI.intersection(cpu()["instruction_sets"]):
        return False
    return not errors({})["int8 activations"] <= MOST_ERROR


def session_options(graph: Path) -> dict[str, str]:
    """Session options of ONNX Runtime that a graph needs to be computed right on this processor's cores.

    Raises OSError when the graph cannot be read.
    """
    with graph.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        concerned = content.find(b"DynamicQuantizeMatMul") >= 0
    return dict(RIGHT) if concerned and overflows() else {}


def wrong() -> dict[str, float]:
    """The kernels that this processor computes wrong, and their errors."""
    return {name: error for name, error in errors().items() if not error <= MOST_ERROR}
