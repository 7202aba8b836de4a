"""What each kind of product costs on this processor: measured with ONNX Runtime, on the threads that will be used.

In decoding every matrix is read from memory once a token, so a product is not measured on one matrix, which would stay
in the cache, but on copies in turn that together are as large as the model or three large caches. Each run is short and
the fastest ones count: what else the machine does can only make a run slower, and a short one often escapes it. What a
token costs beside the matrices (norms, attention over a cache of keys and values, the activation function) is measured
once, with as many layers as the model has.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.export.quantize.calibrate import fitted
from edgetune.export.quantize.grid import Grid
from edgetune.export.quantize.plan import EMBEDDING, HEAD
from edgetune.files import read_json, write_json
from edgetune.runtime import kernels

if TYPE_CHECKING:
    import numpy as np
    import onnx

MANY = 128  # tokens of a prompt that the runtime reads at once, where only the last position goes through the head
_PAST = 288  # tokens in the cache while the rest is measured: half of what `edgetune bench` makes
_BYTES = 96 << 20  # of all copies of a matrix: three times a large cache
_BYTES_A_RUN = 4 << 20
_COPIES = 32  # in a run
_SECONDS = 0.4  # of measuring
_FEWEST = 7  # runs
_MICRO = "com.microsoft"
_FLOAT, _HALF, _UINT8, _INT8, _INT32 = 1, 10, 2, 3, 6  # onnx.TensorProto's numbers


Timed = tuple[int, int, Grid, int]  # rows and columns of a matrix, its grid, and how many tokens are computed at once


@dataclass(frozen=True)
class Shape:
    """What a model's token costs beside its matrices depends on this."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_size: int


class Costs:
    """Seconds of products, measured when they are first asked for and kept in a file.

    Args:
        kept: existing folder.
        threads: of ONNX Runtime.
        model_bytes: of the model's weights: a small model stays in the cache as a whole.
    """

    def __init__(self, kept: Path, threads: int, model_bytes: int) -> None:
        self._file, self._threads = kept / "costs.json", threads
        self._bytes = min(_BYTES, max(model_bytes, 1 << 20))
        self._known: dict[str, float] = read_json(self._file) if self._file.is_file() else {}

    def seconds(self, rows: int, columns: int, grid: Grid, tokens: int) -> float:
        """Of one product of (tokens, columns) with a matrix (rows, columns) on a grid."""
        key = _key((rows, columns, grid, tokens))
        if key not in self._known:
            size = grid.size(rows, columns)
            copies, runs = 1, 1  # many tokens compute more than they read
            if tokens == 1:
                copies = max(1, min(_COPIES, _BYTES_A_RUN // size))
                runs = max(2, self._bytes // (size * copies))
            given = {"x": _values(tokens, columns)}
            made = [_Run(_products(rows, columns, grid, copies, at), given, self._threads) for at in range(runs)]
            self._keep(key, _fastest(made) / copies)
        return self._known[key]

    def token(self, shapes: dict[str, tuple[int, int]], grid: Grid, *, whole: bool = False) -> tuple[float, float]:
        """Of a group's matrices on a grid, for a token that is computed alone, and as one of many; see `timed`."""
        found = [self.seconds(*one) for one in timed(shapes, grid, whole=whole)]
        return sum(found[::2]), sum(found[1::2]) / MANY

    def knows(self, one: Timed) -> bool:
        """Whether a product was timed before."""
        return _key(one) in self._known

    def knows_rest(self, shape: Shape) -> bool:
        """Whether what a token costs beside the matrices was timed before."""
        return f"rest of {shape} at 1" in self._known

    def rest(self, shape: Shape, tokens: int) -> float:
        """Of so many tokens at once, beside the matrices. 0 where this build cannot run such a graph."""
        from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, InvalidGraph, NotImplemented

        key = f"rest of {shape} at {tokens}"
        if key not in self._known:
            try:
                self._keep(key, _rest(shape, tokens, self._threads))
            except (Fail, InvalidArgument, InvalidGraph, NotImplemented):
                self._keep(key, 0.0)
        return self._known[key]

    def _keep(self, key: str, seconds: float) -> None:
        self._known[key] = seconds
        write_json(self._file, self._known)


def products(shapes: dict[str, tuple[int, int]], grid: Grid) -> list[tuple[int, int]]:
    """The products (rows, columns) that the graph makes of a group's matrices: `kernels.put_kernels` joins some."""
    last = [name.rpartition(".")[2] for name in shapes]
    joined = last == ["q_proj", "k_proj", "v_proj"] or (
        sorted(last) == ["gate_proj", "up_proj"] and grid.activations == "int8"
    )
    if joined:
        return [(sum(rows for rows, _ in shapes.values()), next(iter(shapes.values()))[1])]
    return list(shapes.values())


def timed(shapes: dict[str, tuple[int, int]], grid: Grid, *, whole: bool = False) -> list[Timed]:
    """What is timed for a group's matrices on a grid: each product with one token and with many. Of a prompt only the last
    position goes through the head, unless the `whole` one does. An embedding is looked up, which costs next to nothing."""
    if EMBEDDING in shapes:
        return []
    name, (_, width) = next(iter(shapes.items()))
    own, many = fitted(name, grid, width), 1 if HEAD in shapes and not whole else MANY
    return [(rows, columns, own, tokens) for rows, columns in products(shapes, own) for tokens in (1, many)]


def _key(one: Timed) -> str:
    rows, columns, grid, tokens = one
    return f"{grid} {rows}x{columns} at {tokens}"


def _products(rows: int, columns: int, grid: Grid, copies: int, seed: int) -> onnx.ModelProto:
    """A graph of products with different matrices, one after the other."""
    import numpy as np
    from onnx import helper

    nodes, stored = [], []
    drawn = np.random.default_rng(seed)
    for at in range(copies):
        tensors, attributes = _matrix(rows, columns, grid, at, drawn)
        op = "DynamicQuantizeMatMul" if grid.activations == "int8" else "MatMulNBits"
        stored += tensors
        names = ["x", *(one.name for one in tensors)]
        nodes.append(helper.make_node(op, names, [f"y{at}"], domain=_MICRO, **attributes))
    outputs = [helper.make_tensor_value_info(f"y{at}", _FLOAT, None) for at in range(copies)]
    given = [helper.make_tensor_value_info("x", _FLOAT, [None, columns])]
    return _model(nodes, given, outputs, stored)


def _matrix(
    rows: int, columns: int, grid: Grid, at: int, drawn: np.random.Generator
) -> tuple[list[onnx.TensorProto], dict[str, int]]:
    import numpy as np

    def tensor(name: str, kind: int, values: np.ndarray) -> onnx.TensorProto:
        from onnx import helper

        return helper.make_tensor(f"{name}{at}", kind, values.shape, values.tobytes(), raw=True)

    if grid.activations == "int8":
        codes = drawn.integers(-127, 128, (columns, rows), dtype=np.int8)
        found = [tensor("w", _INT8, codes), tensor("s", _FLOAT, np.full(rows, 0.01, np.float32))]
        if kernels.overflows():  # what loading makes of int8 weights then; these sessions optimize nothing
            found[0] = tensor("w", _UINT8, codes.view(np.uint8) ^ 0x80)
            found.append(tensor("z", _UINT8, np.array(128, np.uint8)))
        return found, {}
    blocks = grid.blocks(columns)
    codes = drawn.integers(0, 256, (rows, blocks, grid.block(columns) * grid.bits // 8), dtype=np.uint8)
    found = [tensor("w", _UINT8, codes), tensor("s", _FLOAT, np.full(rows * blocks, 0.01, np.float32))]
    if grid.zero_points:
        zeros = drawn.integers(0, 256, rows * -(-blocks * grid.bits // 8), dtype=np.uint8)
        found.append(tensor("z", _UINT8, zeros))
    attributes = {"K": columns, "N": rows, "bits": grid.bits, "block_size": grid.block(columns), "accuracy_level": 4}
    return found, attributes


def _rest(shape: Shape, tokens: int, threads: int) -> float:
    """Seconds of all layers' norms, attention and activation function, with a cache that is written in place."""
    from onnx import helper

    past = _PAST
    width = (shape.heads + 2 * shape.kv_heads) * shape.head_size
    cache = [1, shape.kv_heads, past + MANY, shape.head_size]
    given = [
        helper.make_tensor_value_info("x", _FLOAT, [1, tokens, shape.hidden]),
        helper.make_tensor_value_info("qkv", _FLOAT, [1, tokens, width]),
        helper.make_tensor_value_info("inner", _FLOAT, [1, tokens, shape.inner]),
        helper.make_tensor_value_info("cos", _FLOAT, [past + MANY, shape.head_size // 2]),
        helper.make_tensor_value_info("last", _INT32, [1]),
        helper.make_tensor_value_info("total", _INT32, [1]),
        helper.make_tensor_value_info("gain", _FLOAT, [shape.hidden]),
    ]
    nodes, outputs = [], []
    for at in range(shape.layers):
        own = [f"k{at}", f"v{at}"]
        given += [helper.make_tensor_value_info(name, _FLOAT, cache) for name in own]
        for part in ("a", "b"):
            nodes.append(
                helper.make_node(
                    "SkipSimplifiedLayerNormalization",
                    ["x", "x", "gain"],
                    [f"n{part}{at}", "", "", f"s{part}{at}"],
                    domain=_MICRO,
                    epsilon=1e-5,
                )
            )
        nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                ["qkv", "", "", *own, "last", "total", "cos", "cos"],
                [f"o{at}", f"new_k{at}", f"new_v{at}"],
                domain=_MICRO,
                num_heads=shape.heads,
                kv_num_heads=shape.kv_heads,
                do_rotary=1,
            )
        )
        nodes += [
            helper.make_node("Sigmoid", ["inner"], [f"g{at}"]),
            helper.make_node("Mul", ["inner", f"g{at}"], [f"h{at}"]),
            helper.make_node("Mul", ["inner", f"h{at}"], [f"i{at}"]),
        ]
        outputs += [helper.make_tensor_value_info(f"{name}{at}", _FLOAT, None) for name in ("o", "i", "na", "nb")]
        outputs += [helper.make_tensor_value_info(f"new_{name}", _FLOAT, cache) for name in own]
    feeds = {
        "x": _values(1, tokens, shape.hidden),
        "qkv": _values(1, tokens, width),
        "inner": _values(1, tokens, shape.inner),
        "cos": _values(past + MANY, shape.head_size // 2),
        "gain": _values(shape.hidden),
    }
    return _fastest([_Run(_model(nodes, given, outputs, []), feeds, threads, past + tokens, cache)])


def _model(
    nodes: Sequence[Any], given: Sequence[Any], outputs: Sequence[Any], stored: Sequence[Any]
) -> onnx.ModelProto:
    from onnx import helper

    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(_MICRO, 1)]
    graph = helper.make_graph(nodes, "costs", given, outputs, stored)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _values(*shape: int) -> np.ndarray:
    import numpy as np

    return np.random.default_rng(0).standard_normal(shape, np.float32)


class _Run:
    """A graph that is ready to run.

    Args:
        feeds: its inputs.
        total: tokens in the caches of keys and values, which are written in place; 0 where there are none.
        cache: their shape.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        feeds: dict[str, np.ndarray],
        threads: int,
        total: int = 0,
        cache: Sequence[int] = (),
    ) -> None:
        import numpy as np
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        # the copies read the same inputs: nothing shall be taken for a repetition of another
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self._binding = self._session.io_binding()
        if total:
            counts = {"last": np.array([total - 1], np.int32), "total": np.array([total], np.int32)}
            feeds = {**feeds, **counts}
        for name, value in feeds.items():
            self._binding.bind_cpu_input(name, value)
        caches = {}
        for one in self._session.get_inputs():
            if one.name not in feeds:
                caches[one.name] = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(cache, np.float32))
                self._binding.bind_ortvalue_input(one.name, caches[one.name])
        for one in self._session.get_outputs():
            own = caches.get(one.name.removeprefix("new_"))
            if own is None:
                self._binding.bind_output(one.name)
            else:
                self._binding.bind_ortvalue_output(one.name, own)
        self._feeds = feeds  # bound, not copied

    def seconds(self) -> float:
        """Of one run."""
        start = time.perf_counter()
        self._session.run_with_iobinding(self._binding)
        return time.perf_counter() - start


def _fastest(runs: Sequence[_Run]) -> float:
    """Seconds of the fastest tenth of many runs, in turn."""
    for one in runs:
        one.seconds()
    found: list[float] = []
    end = time.perf_counter() + _SECONDS
    while len(found) < _FEWEST or time.perf_counter() < end:
        found += [one.seconds() for one in runs]
    found.sort()
    return found[len(found) // 10]
