"""Puts the quantized embedding into a decoder graph that ONNX Runtime GenAI's model builder made.

The builder looks tokens up in a float matrix unless it quantized the model itself. Here `GatherBlockQuantized` takes
that place. A tied embedding reads the head's weights: two initializers name the same bytes of the data file, so that
they lie on disk once, and once in memory where the runtime maps the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgetune.errors import EdgetuneError
from edgetune.export.quantize.checkpoint import EMBEDDING_FILE
from edgetune.export.quantize.plan import EMBEDDING

if TYPE_CHECKING:
    import onnx_ir as ir

_DOMAIN = "com.microsoft"
_ALIGNMENT = 65_536  # of a tensor in the data file: Windows maps files at such offsets only


def put_embedding(graph_file: Path, checkpoint: Path) -> None:
    """Replace the stub embedding of a graph, in place.

    Args:
        graph_file: model.onnx, whose weights lie in one file beside it.
        checkpoint: the quantized checkpoint that it was made from; an untied embedding is read from there and appended
            to the data file.

    Raises:
        EdgetuneError: the graph is not as the builder makes it.
    """
    import onnx_ir as ir

    model = ir.load(graph_file)
    graph = model.graph
    name = f"{EMBEDDING}.weight"
    stub = graph.initializers.get(name)
    lookups = [] if stub is None else [use.node for use in stub.uses()]
    if stub is None or len(lookups) != 1 or lookups[0].op_type != "Gather":
        raise EdgetuneError("the builder's graph has no embedding that can be replaced", where=graph_file)
    lookup = lookups[0]
    apart = (checkpoint / EMBEDDING_FILE).is_file()
    tensors, attributes = _appended(graph_file, checkpoint) if apart else _of_head(graph, graph_file)
    values = [ir.Value(name=tensor.name, const_value=tensor, shape=tensor.shape) for tensor in tensors]
    for value, tensor in zip(values, tensors, strict=True):
        value.type = ir.TensorType(tensor.dtype)
        graph.register_initializer(value)
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
    ir.save(model, graph_file)


def _of_head(graph: ir.Graph, graph_file: Path) -> tuple[list[ir.ExternalTensor], dict[str, int]]:
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


def _appended(graph_file: Path, checkpoint: Path) -> tuple[list[ir.ExternalTensor], dict[str, int]]:
    """An untied embedding: its tensors, appended to the data file."""
    import onnx_ir as ir
    from safetensors import safe_open

    location = f"{graph_file.name}.data"
    found = []
    with (
        safe_open(str(checkpoint / EMBEDDING_FILE), "np") as file,
        (graph_file.parent / location).open("ab") as data,
    ):
        metadata = file.metadata()
        names = [name for name in ("codes", "scales", "zeros") if name in file.keys()]  # noqa: SIM118 - not a dict
        for name in names:
            array = file.get_tensor(name)
            data.write(bytes(-data.tell() % _ALIGNMENT))
            offset = data.tell()
            data.write(array.tobytes())
            found.append(
                ir.ExternalTensor(
                    location,
                    offset,
                    array.nbytes,
                    ir.DataType.from_numpy(array.dtype),
                    shape=ir.Shape(array.shape),
                    name=f"{EMBEDDING}.{name}",
                    base_dir=graph_file.parent,
                )
            )
    return found, {name: int(metadata[name]) for name in ("bits", "block_size")}
