"""Weights of a graph: to 8 bits, and into one file for all graphs of an artifact."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.export.quantize.graph import store
from edgetune.export.quantize.grid import Grid
from edgetune.export.quantize.kernels import DOMAIN, register
from edgetune.export.quantize.rtn import min_max

if TYPE_CHECKING:
    import onnx_ir as ir

DATA = "model.onnx.data"
_SMALL = 256  # bytes: stays in the graph file, where shapes are inferred from it
_WORTH = 1 << 12  # weights: smaller matrices, heads with a few labels above all, stay as they are
_INT8 = 4  # `accuracy_level` of MatMulNBits: inputs are rounded to 8 bits too, with a scale for each block of a row


def to_eight_bits(model: ir.Model, block_size: int) -> int:
    """Give a graph's matrices 8 bits, rounded to nearest in symmetric blocks; biases and norms stay.

    Products become `MatMulNBits`, tables that are looked up `GatherBlockQuantized`. Inputs of a product are rounded a block of a
    row at a time, so that a text's numbers do not depend on what else is in its batch.

    Returns:
        How many products and tables.
    """
    grid, made = Grid(8, block_size), 0
    stored: dict[tuple[str, bool], list[ir.Value]] = {}
    for node in list(model.graph):
        at = {"MatMul": 1, "Gather": 0}.get(node.op_type)
        if at is None or node.domain not in ("", "ai.onnx"):
            continue
        weights = node.inputs[at]
        if weights is None or not _fits(weights, node.op_type, block_size):
            continue
        if node.op_type == "Gather" and "axis" in node.attributes and node.attributes["axis"].as_int() != 0:
            continue
        key = (weights.name or "", node.op_type == "Gather")
        if key not in stored:
            stored[key] = register(model.graph, _tensors(weights, grid, looked_up=key[1]))
        _replace(model.graph, node, stored[key], grid, weights)
        made += 1
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]
    model.opset_imports[DOMAIN] = 1
    return made


def _fits(weights: ir.Value, kind: str, block_size: int) -> bool:
    import onnx_ir as ir

    tensor = weights.const_value
    if tensor is None or not weights.is_initializer() or len(tensor.shape) != 2 or tensor.dtype != ir.DataType.FLOAT:
        return False
    depth = tensor.shape.numpy()[0 if kind == "MatMul" else 1]  # the numbers that a row of a product adds up
    return tensor.size >= _WORTH and depth % block_size == 0


def _tensors(weights: ir.Value, grid: Grid, looked_up: bool) -> list[Any]:
    """Codes and scales, as the operator wants them."""
    import onnx_ir as ir
    import torch

    assert weights.const_value is not None
    matrix = torch.from_numpy(weights.const_value.numpy().copy())
    found = min_max(matrix if looked_up else matrix.T.contiguous(), grid)
    assert found.zeros is None
    codes = found.codes if looked_up else found.packed_codes()
    name = f"{weights.name}.{'rows' if looked_up else 'product'}"
    return [
        ir.tensor(codes.contiguous().numpy(), name=f"{name}.codes"),
        ir.tensor(found.scales.contiguous().numpy(), name=f"{name}.scales"),
    ]


def _replace(graph: ir.Graph, node: ir.Node, stored: list[ir.Value], grid: Grid, weights: ir.Value) -> None:
    import onnx_ir as ir

    assert weights.const_value is not None
    out, (depth, wide) = node.outputs[0], weights.const_value.shape.numpy()
    common = {"bits": grid.bits, "block_size": grid.block_size}
    made = ir.Value(name=f"{out.name}.8", type=out.type, shape=out.shape)
    if node.op_type == "MatMul":
        attributes = {"K": depth, "N": wide, "accuracy_level": _INT8, **common}
        new = ir.node("MatMulNBits", [node.inputs[0], *stored], attributes, domain=DOMAIN, outputs=[made])
    else:
        attributes = {"gather_axis": 0, "quantize_axis": 1, **common}
        inputs = [stored[0], node.inputs[1], stored[1]]
        new = ir.node("GatherBlockQuantized", inputs, attributes, domain=DOMAIN, outputs=[made])
    new.name = f"{node.name}.8"
    graph.insert_before(node, new)
    name = out.name
    out.replace_all_uses_with(made, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    made.name = name


def write_graphs(models: Mapping[str, ir.Model], folder: Path) -> None:
    """Write graphs and, in one file beside them, their weights; what several hold lies there once.

    What `torch` notes of the code that a node came from is left out.
    """
    import onnx_ir as ir

    placed: dict[Any, int] = {}  # where a tensor lies, by its content
    with (folder / DATA).open("wb") as data:
        for model in models.values():
            _strip(model)
            for value in model.graph.initializers.values():
                tensor = value.const_value
                if tensor is None:
                    continue
                if tensor.nbytes < _SMALL and tensor.dtype != ir.DataType.UINT8:
                    value.const_value = ir.tensor(tensor.numpy().copy(), name=value.name)
                    continue
                store(value, data, placed, hashlib.sha256(tensor.tobytes()).hexdigest(), folder / DATA)
        data.flush()
        os.fsync(data.fileno())
    for name, model in models.items():
        ir.save(model, folder / name)


def _strip(model: ir.Model) -> None:
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.doc_string = None
    model.producer_name, model.producer_version = "edgetune", None
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
    for value in [
        *model.graph.inputs,
        *model.graph.initializers.values(),
        *(o for n in model.graph for o in n.outputs),
    ]:
        value.metadata_props.clear()
