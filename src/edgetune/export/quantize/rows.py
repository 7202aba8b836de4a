"""Gives a graph whose head gets the last position only the likeliest token of each position, where they are few.

A guess of what comes next (`runtime/speculation.py`) is right as far as the model says the same at each of its
positions. So up to `MOST_ROWS` positions go through the head, of more only the last. The logits stay those of the last
position; the tokens are an output of their own, `row_tokens` (batch, rows) int64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgetune.export.quantize.kernels import register
from edgetune.runtime.speculation import MOST_ROWS, ROW_TOKENS

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

_PRUNE, _ROWS = "/lm_head/prune", "/lm_head/rows"
_END = 2**62


def put_rows(graph: ir.Graph) -> bool:
    """Put it into a graph that the builder made with `prune_lm_head`. Returns whether it is one."""
    import numpy as np
    import onnx_ir as ir

    nodes = {node.name: node for node in graph}
    chosen, shaped = nodes.get(f"{_PRUNE}/Gather"), nodes.get(f"{_PRUNE}/Unsqueeze")
    logits = next((value for value in graph.outputs if value.name == "logits"), None)
    head = logits.producer() if logits is not None else None
    if chosen is None or shaped is None or logits is None or head is None:
        return False
    numbers = {"limit": MOST_ROWS, "first": 0, "last": -1, "end": _END, "axis": 1}
    tensors = [ir.tensor(np.array([value], np.int64), name=f"{_ROWS}/{name}") for name, value in numbers.items()]
    limit, first, last, end, axis = register(graph, tensors)
    hidden = chosen.inputs[0]
    count = _made("count", ir.DataType.INT64, [1])
    many = _made("many", ir.DataType.BOOL, [1])
    start = _made("start", ir.DataType.INT64, [1])
    rows = _made("hidden", shaped.outputs[0].dtype, None)
    before = [
        ir.node("Shape", [hidden], {"start": 1, "end": 2}, outputs=[count], name=f"{_ROWS}/Shape"),
        ir.node("Greater", [count, limit], outputs=[many], name=f"{_ROWS}/Greater"),
        ir.node("Where", [many, last, first], outputs=[start], name=f"{_ROWS}/Where"),
        ir.node("Slice", [hidden, start, end, axis], outputs=[rows], name=f"{_ROWS}/Slice"),
    ]
    graph.insert_before(chosen, before)
    ir.convenience.replace_all_uses_with(shaped.outputs[0], rows)
    graph.remove([shaped, chosen], safe=True)
    given = ir.Value(name="logits", shape=logits.shape, type=logits.type)
    logits.name, logits.shape = f"{_ROWS}/logits", None
    tokens = ir.Value(name=ROW_TOKENS, shape=ir.Shape(["batch_size", "rows"]), type=ir.TensorType(ir.DataType.INT64))
    graph.insert_after(
        head,
        [
            ir.node("Slice", [logits, last, end, axis], outputs=[given], name=f"{_ROWS}/Last"),
            ir.node("ArgMax", [logits], {"axis": 2, "keepdims": 0}, outputs=[tokens], name=f"{_ROWS}/ArgMax"),
        ],
    )
    graph.outputs[list(graph.outputs).index(logits)] = given
    graph.outputs.append(tokens)
    return True


def _made(name: str, dtype: Any, shape: list[int] | None) -> ir.Value:
    import onnx_ir as ir

    return ir.Value(
        name=f"{_ROWS}/{name}",
        shape=None if shape is None else ir.Shape(shape),
        type=None if dtype is None else ir.TensorType(dtype),
    )


def all_rows(graph: onnx.GraphProto) -> bool:
    """Have a graph with `put_rows` give the logits of all positions. Returns whether it is one."""
    import numpy as np
    from onnx import numpy_helper

    nodes = {node.name: node for node in graph.node}
    last = nodes.get(f"{_ROWS}/Last")
    limits = [value for value in graph.initializer if value.name == f"{_ROWS}/limit"]
    if last is None or len(limits) != 1:
        return False
    limits[0].CopyFrom(numpy_helper.from_array(np.array([_END], np.int64), limits[0].name))
    last.input[1] = f"{_ROWS}/first"
    return True
