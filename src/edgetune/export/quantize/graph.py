"""Gives a decoder graph that ONNX Runtime GenAI's model builder made its embedding and its kernels.

The builder looks tokens up in a float matrix unless it quantized the model itself. Here `GatherBlockQuantized` takes
that place. A tied embedding reads the head's weights: two initializers name the same bytes of the data file, so that
they lie on disk once, and once in memory where the runtime maps the file.

Matrices with int8 activations become `DynamicQuantizeMatMul`. Both operators are described in ONNX Runtime's
docs/ContribOperators.md.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.errors import EdgetuneError
from edgetune.export.quantize.checkpoint import EMBEDDING_FILE
from edgetune.export.quantize.plan import EMBEDDING

if TYPE_CHECKING:
    import onnx_ir as ir

_DOMAIN = "com.microsoft"
_LARGE, _ALIGNMENT = 1 << 20, 65_536  # bytes: a large tensor starts where Windows, too, can map a file
_SMALL = 1_024  # bytes: stays in the graph file


def finish(graph_file: Path, checkpoint: Path, int8: Sequence[str]) -> None:
    """Replace the stub embedding and the kernels, and write graph and data file anew, in place.

    Args:
        graph_file: model.onnx, whose weights lie in one file beside it.
        checkpoint: the quantized checkpoint that it was made from.
        int8: full names of the matrices that are to be computed with int8 activations.

    Raises:
        EdgetuneError: the graph is not as the builder makes it.
    """
    import onnx_ir as ir

    model = ir.load(graph_file)
    _put_embedding(model.graph, graph_file, checkpoint)
    for name in int8:
        _put_int8(model.graph, graph_file, name)
    _save(model, graph_file)


def _put_embedding(graph: ir.Graph, graph_file: Path, checkpoint: Path) -> None:
    """Put the quantized lookup in place of the stub."""
    import onnx_ir as ir

    name = f"{EMBEDDING}.weight"
    stub = graph.initializers.get(name)
    lookups = [] if stub is None else [use.node for use in stub.uses()]
    if stub is None or len(lookups) != 1 or lookups[0].op_type != "Gather":
        raise EdgetuneError("the builder's graph has no embedding that can be replaced", where=graph_file)
    lookup = lookups[0]
    apart = (checkpoint / EMBEDDING_FILE).is_file()
    tensors, attributes = _stored_embedding(checkpoint) if apart else _of_head(graph, graph_file)
    values = _registered(graph, tensors)
    found = ir.node(
        "GatherBlockQuantized",
        [values[0], lookup.inputs[1], *values[1:]],
        {**attributes, "gather_axis": 0, "quantize_axis": 1},
        domain=_DOMAIN,
        name=f"{lookup.name}BlockQuantized",
        outputs=[ir.Value(name=f"{lookup.name}BlockQuantized/output_0", type=lookup.outputs[0].type)],
    )
    found.outputs[0].shape = lookup.outputs[0].shape
    graph.insert_before(lookup, found)
    lookup.outputs[0].replace_all_uses_with(found.outputs[0])
    graph.remove(lookup, safe=True)
    del graph.initializers[name]


def _registered(graph: ir.Graph, tensors: Sequence[Any]) -> list[ir.Value]:
    """Initializers of the graph that hold these tensors."""
    import onnx_ir as ir

    values = []
    for tensor in tensors:
        value = ir.Value(name=tensor.name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
        graph.register_initializer(value)
        values.append(value)
    return values


def _of_head(graph: ir.Graph, graph_file: Path) -> tuple[list[Any], dict[str, int]]:
    """The head's codes, scales and zero points once more, in the shapes in which a lookup wants them."""
    import onnx_ir as ir

    heads = [node for node in graph if node.op_type == "MatMulNBits" and (node.name or "").startswith("/lm_head/")]
    if len(heads) != 1:
        raise EdgetuneError("the builder's graph has no quantized head to share", where=graph_file)
    attributes = {name: heads[0].attributes[name].as_int() for name in ("N", "K", "bits", "block_size")}
    rows, blocks = attributes["N"], attributes["K"] // attributes["block_size"]
    shapes = ((rows, attributes["K"] * attributes["bits"] // 8), (rows, blocks), (rows, -1))
    found = []
    for value, shape, name in zip(heads[0].inputs[1:], shapes, ("codes", "scales", "zeros"), strict=False):
        tensor = value.const_value if value is not None else None
        if not isinstance(tensor, ir.ExternalTensor):
            raise EdgetuneError("the builder's graph keeps its head elsewhere", where=graph_file)
        filled = [tensor.size // rows if size == -1 else size for size in shape]
        found.append(
            ir.ExternalTensor(
                tensor.location,
                tensor.offset,
                tensor.length,
                tensor.dtype,
                shape=ir.Shape(filled),
                name=f"{EMBEDDING}.{name}",
                base_dir=tensor.base_dir,
            )
        )
    return found, {name: attributes[name] for name in ("bits", "block_size")}


def _stored_embedding(checkpoint: Path) -> tuple[list[Any], dict[str, int]]:
    """An untied embedding, from its file."""
    import onnx_ir as ir
    from safetensors import safe_open

    with safe_open(str(checkpoint / EMBEDDING_FILE), "np") as file:
        metadata = file.metadata()
        names = [name for name in ("codes", "scales", "zeros") if name in file.keys()]  # noqa: SIM118 - not a dict
        found = [ir.tensor(file.get_tensor(name), name=f"{EMBEDDING}.{name}") for name in names]
    return found, {name: int(metadata[name]) for name in ("bits", "block_size")}


def _put_int8(graph: ir.Graph, graph_file: Path, name: str) -> None:
    """Give one matrix the kernel that rounds its inputs to 8 bits."""
    import numpy as np
    import onnx_ir as ir

    stored = f"{name.replace('.self_attn.', '.attn.')}.MatMulNBits"
    codes, scales = (graph.initializers.get(f"{stored}.{last}") for last in ("qweight", "scales"))
    users = [] if codes is None else [use.node for use in codes.uses()]
    if codes is None or scales is None or len(users) != 1 or users[0].op_type != "MatMulNBits":
        raise EdgetuneError(f"the builder's graph has no {name} whose kernel can be changed", where=graph_file)
    node = users[0]
    rows, columns = node.attributes["N"].as_int(), node.attributes["K"].as_int()
    assert codes.const_value is not None
    assert scales.const_value is not None
    source, by_row = codes.const_value, scales.const_value.numpy().reshape(rows, -1)[:, 0]

    def transposed() -> ir.TensorProtocol:
        turned = (source.numpy().reshape(rows, -1)[:, :columns] ^ 0x80).view(np.int8).T  # 128 is the zero of the codes
        return ir.tensor(np.ascontiguousarray(turned))

    weights = ir.LazyTensor(transposed, ir.DataType.INT8, ir.Shape([columns, rows]), name=f"{name}.int8")
    tensors = (weights, ir.tensor(np.ascontiguousarray(by_row), name=f"{name}.int8_scales"))
    values = _registered(graph, tensors)
    found = ir.node(
        "DynamicQuantizeMatMul",
        [node.inputs[0], *values],
        domain=_DOMAIN,
        name=(node.name or name).replace("MatMulNBits", "DynamicQuantizeMatMul"),
        outputs=[ir.Value(name=f"{name}.int8/output_0", type=node.outputs[0].type)],
    )
    found.outputs[0].shape = node.outputs[0].shape
    graph.insert_before(node, found)
    node.outputs[0].replace_all_uses_with(found.outputs[0])
    graph.remove(node, safe=True)
    del graph.initializers[f"{stored}.qweight"], graph.initializers[f"{stored}.scales"]


def _save(model: ir.Model, graph_file: Path) -> None:
    """Write the data file anew, a tensor at a time and each only once, and the graph."""
    import onnx_ir as ir

    location = f"{graph_file.name}.data"
    old, new = graph_file.parent / location, graph_file.parent / f"{location}.new"
    placed: dict[tuple[int | None, int | None], int] = {}  # where bytes of the old file lie in the new one
    with new.open("wb") as data:
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < _SMALL:
                continue
            key = (tensor.offset, tensor.length) if isinstance(tensor, ir.ExternalTensor) else (id(tensor), None)
            if key not in placed:
                data.write(bytes(-data.tell() % (_ALIGNMENT if tensor.nbytes >= _LARGE else 64)))
                placed[key] = data.tell()
                data.write(tensor.tobytes())
            value.const_value = ir.ExternalTensor(
                location,
                placed[key],
                tensor.nbytes,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=value.name or "",
                base_dir=graph_file.parent,
            )
        for value in model.graph.initializers.values():  # small ones leave the old file, too
            if isinstance(value.const_value, ir.ExternalTensor) and value.const_value.nbytes < _SMALL:
                value.const_value = ir.tensor(value.const_value.numpy().copy(), name=value.name)
        data.flush()
        os.fsync(data.fileno())
    new.replace(old)
    ir.save(model, graph_file)
