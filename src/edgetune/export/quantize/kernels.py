"""Which operator computes each matrix in the graph, and which matrices go through one product.

`MatMulNBits` computes with the weights' grid; `DynamicQuantizeMatMul` rounds its inputs to 8 bits, too. Queries, keys and
values on one grid become one product, which `GroupQueryAttention` takes as it is: three small products cost a token twice
the time of one. Gate and up with int8 activations become one, too, whose halves a `Split` hands on. The operators are
described in ONNX Runtime's docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.errors import EdgetuneError

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN = "com.microsoft"
_STORED = ("qweight", "scales", "qzeros")


def put_kernels(graph: ir.Graph, graph_file: Path, int8: Iterable[str], *, unsigned: bool = False) -> None:
    """Give every quantized matrix of the decoder layers its kernel.

    Args:
        graph: as the builder made it: each matrix a `MatMulNBits`.
        graph_file: for messages.
        int8: full names of the matrices that are to be computed with int8 activations.
        unsigned: store these as uint8 with the zero point 128, in place of int8.

    Raises:
        EdgetuneError: the graph is not as the builder makes it.
    """
    nodes = [node for node in graph if node.op_type == "MatMulNBits"]
    by_name = {
        (node.inputs[1].name or "").removesuffix(".MatMulNBits.qweight"): node for node in nodes if node.inputs[1]
    }
    rounded = set()
    for name in int8:
        node = by_name.get(name.replace(".self_attn.", ".attn."))
        if node is None:
            raise EdgetuneError(f"the builder's graph has no {name} whose kernel can be changed", where=graph_file)
        rounded.add(node)
    joined = set()
    for attention in [node for node in graph if node.op_type == "GroupQueryAttention"]:
        parts = _parts(attention, rounded)
        if parts:
            _join_attention(graph, attention, parts, parts[0] in rounded)
            joined |= set(parts)
    for gate in [node for node in nodes if _last(node) == "gate_proj" and node in rounded]:
        read = gate.inputs[0]
        ups = [
            use.node for use in (read.uses() if read else ()) if _last(use.node) == "up_proj" and use.node in rounded
        ]
        if len(ups) == 1:
            _join_gate(graph, [gate, ups[0]])
            joined |= {gate, ups[0]}
    for node in nodes:  # in the graph's order, so that the same model gives the same files
        if node in rounded and node not in joined:
            _replace(graph, [node], node.outputs[0], True)
    if unsigned:
        for node in [node for node in graph if node.op_type == "DynamicQuantizeMatMul"]:
            _make_unsigned(graph, node)


def halve_scales(graph: ir.Graph) -> None:
    """Store the scales of 4-bit matrices in 16 bits. They are widened once, when the graph is loaded."""
    import onnx_ir as ir

    wide: dict[Any, ir.Value] = {}
    for node in list(graph):
        if node.op_type not in ("MatMulNBits", "GatherBlockQuantized") or node.attributes["bits"].as_int() != 4:
            continue
        scales = node.inputs[2]
        assert scales is not None
        tensor = scales.const_value
        assert tensor is not None
        if tensor.dtype == ir.DataType.FLOAT16:  # a graph that computes in 16 bits
            continue
        key = (tensor.offset, tensor.length) if isinstance(tensor, ir.ExternalTensor) else id(tensor)
        if key not in wide:
            rows = node.attributes["N"].as_int() if "N" in node.attributes else tensor.numpy().shape[0]
            wide[key] = _widened(graph, scales.name or "", tensor, rows)
        node.replace_input_with(2, wide[key])
        if not scales.uses():
            del graph.initializers[scales.name or ""]


def _widened(graph: ir.Graph, name: str, tensor: Any, rows: int) -> ir.Value:
    """A float32 value (rows, blocks) that is cast from an initializer of 16 bits."""
    import numpy as np
    import onnx_ir as ir

    shape = ir.Shape([rows, tensor.size // rows])

    def narrow() -> ir.TensorProtocol:
        return ir.tensor(tensor.numpy().reshape(rows, -1).astype(np.float16))

    stored = register(graph, [ir.LazyTensor(narrow, ir.DataType.FLOAT16, shape, name=f"{name}.16")])[0]
    made = ir.Value(name=f"{name}.32", shape=shape, type=ir.TensorType(ir.DataType.FLOAT))
    graph.insert_before(graph[0], ir.node("Cast", [stored], {"to": ir.DataType.FLOAT}, outputs=[made]))
    return made


def register(graph: ir.Graph, tensors: Sequence[Any]) -> list[ir.Value]:
    """Initializers of the graph that hold these tensors."""
    import onnx_ir as ir

    values = []
    for tensor in tensors:
        value = ir.Value(name=tensor.name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
        graph.register_initializer(value)
        values.append(value)
    return values


def _parts(attention: ir.Node, rounded: set[ir.Node]) -> list[ir.Node]:
    """The products of queries, keys and values, if they can be one."""
    made = [value.producer() if value is not None else None for value in attention.inputs[:3]]
    nodes = [node for node in made if node is not None and node.op_type == "MatMulNBits"]
    if len(nodes) != 3 or any(len(node.outputs[0].uses()) != 1 or len(node.inputs) > 4 for node in nodes):
        return []
    grids = {
        (node in rounded, len(node.inputs), *(node.attributes[name].as_int() for name in ("bits", "block_size")))
        for node in nodes
    }
    return nodes if len(grids) == 1 and len({node.inputs[0] for node in nodes}) == 1 else []


def _last(node: ir.Node) -> str:
    """The last part of the name of the matrix that a node multiplies with."""
    parts = (node.name or "").split("/")
    return parts[-2] if len(parts) > 1 else ""


def _join_gate(graph: ir.Graph, parts: list[ir.Node]) -> None:
    """One product in place of gate and up, and a split of what it makes."""
    import onnx_ir as ir

    outs = [node.outputs[0] for node in parts]
    name = (parts[0].name or "").replace("/gate_proj/MatMulNBits", "/gate_up_proj")
    shape = [*(outs[0].shape or [])[:-1], sum(_rows_of(parts))]
    both = ir.Value(name=f"{name}/output_0", type=outs[0].type, shape=ir.Shape(shape))
    halves = [
        ir.Value(name=f"{name}/{half}", type=out.type, shape=out.shape)
        for half, out in zip(("gate", "up"), outs, strict=True)
    ]
    split = ir.node("Split", [both], {"axis": -1, "num_outputs": 2}, name=f"{name}/Split", outputs=halves)
    graph.insert_before(parts[0], split)
    for out, half in zip(outs, halves, strict=True):
        out.replace_all_uses_with(half)
    _replace(graph, parts, both, True, before=split)


def _join_attention(graph: ir.Graph, attention: ir.Node, parts: list[ir.Node], int8: bool) -> None:
    """One product in place of three, read by the attention as packed queries, keys and values."""
    import onnx_ir as ir

    name = f"{(parts[0].name or '').rpartition('/q_proj')[0]}/qkv_proj"
    queries = parts[0].outputs[0]
    shape = [*(queries.shape or [])[:-1], sum(_rows_of(parts))]
    packed = ir.Value(name=f"{name}/output_0", type=queries.type, shape=ir.Shape(shape))
    attention.replace_input_with(0, packed)
    attention.replace_input_with(1, None)
    attention.replace_input_with(2, None)
    _replace(graph, parts, packed, int8)


def _replace(graph: ir.Graph, nodes: list[ir.Node], out: ir.Value, int8: bool, before: ir.Node | None = None) -> None:
    """One node in place of some that read the same input; `out` is the new node's, or that of the only old one."""
    import onnx_ir as ir

    first = nodes[0]
    tensors = _int8(nodes) if int8 else _rows(nodes)
    own = "DynamicQuantizeMatMul" if int8 else "MatMulNBits"
    attributes = {} if int8 else dict(first.attributes)
    if not int8:
        attributes["N"] = ir.AttrInt64("N", sum(_rows_of(nodes)))
    made = out if out.producer() is None else ir.Value(name=f"{first.name}.{own}", type=out.type, shape=out.shape)
    node = ir.Node(
        DOMAIN,
        own,
        [first.inputs[0], *register(graph, tensors)],
        list(attributes.values()),
        name=f"{(out.name or '').rpartition('/')[0]}/{own}",
        outputs=[made],
    )
    graph.insert_before(before or first, node)
    if made is not out:
        out.replace_all_uses_with(made)
    for old in nodes:
        stored = [value for value in old.inputs[1:] if value is not None]
        graph.remove(old, safe=True)
        for value in stored:
            del graph.initializers[value.name or ""]


def _rows_of(nodes: list[ir.Node]) -> list[int]:
    return [node.attributes["N"].as_int() for node in nodes]


def _stored(node: ir.Node, at: int) -> Any:
    value = node.inputs[at]
    assert value is not None
    assert value.const_value is not None
    return value.const_value


def _rows(nodes: list[ir.Node]) -> list[Any]:
    """Codes, scales and zero points of matrices with one grid, one matrix under the other."""
    import numpy as np
    import onnx_ir as ir

    found = []
    for at in range(1, len(nodes[0].inputs)):
        tensors = [_stored(node, at) for node in nodes]
        shape = ir.Shape(
            [sum(int(tensor.shape[0]) for tensor in tensors), *(int(size) for size in tensors[0].shape[1:])]
        )

        def joined(tensors: list[Any] = tensors) -> ir.TensorProtocol:
            return ir.tensor(np.concatenate([tensor.numpy() for tensor in tensors]))

        name = f"{_name(nodes)}.{_STORED[at - 1]}"
        found.append(ir.LazyTensor(joined, tensors[0].dtype, shape, name=name))
    return found


def _int8(nodes: list[ir.Node]) -> list[Any]:
    """Weights (columns, rows) int8 and scales (rows,) of matrices whose blocks all have the scale of their row."""
    import numpy as np
    import onnx_ir as ir

    columns = nodes[0].attributes["K"].as_int()
    counts = _rows_of(nodes)
    sources = [_stored(node, 1) for node in nodes]

    def turned() -> ir.TensorProtocol:
        codes = [one.numpy().reshape(n, -1)[:, :columns] for one, n in zip(sources, counts, strict=True)]
        return ir.tensor(np.ascontiguousarray((np.concatenate(codes) ^ 0x80).view(np.int8).T))  # 128 is the codes' zero

    scales = [_stored(node, 2).numpy().reshape(n, -1)[:, 0] for node, n in zip(nodes, counts, strict=True)]
    name = _name(nodes)
    weights = ir.LazyTensor(turned, ir.DataType.INT8, ir.Shape([columns, sum(counts)]), name=f"{name}.int8")
    return [weights, ir.tensor(np.concatenate(scales), name=f"{name}.int8_scales")]


def _make_unsigned(graph: ir.Graph, node: ir.Node) -> None:
    """uint8 weights and their zero point in place of a node's int8 ones: the same numbers, by kernels that do not overflow."""
    import numpy as np
    import onnx_ir as ir

    old, source = node.inputs[1], _stored(node, 1)
    name = f"{str(source.name).removesuffix('.int8')}.uint8"

    def turned() -> ir.TensorProtocol:
        return ir.tensor(source.numpy().view(np.uint8) ^ 0x80)

    weights = ir.LazyTensor(turned, ir.DataType.UINT8, source.shape, name=name)
    made, zero = register(graph, [weights, ir.tensor(np.array(128, np.uint8), name=f"{name}_zero")])
    node.replace_input_with(1, made)
    node.resize_inputs(4)
    node.replace_input_with(3, zero)
    assert old is not None
    del graph.initializers[old.name or ""]


def _name(nodes: list[ir.Node]) -> str:
    value = nodes[0].inputs[1]
    assert value is not None
    own = (value.name or "").removesuffix(".qweight")
    if len(nodes) == 1:
        return own
    return own.replace(".q_proj.", ".qkv_proj.").replace(".gate_proj.", ".gate_up_proj.")
