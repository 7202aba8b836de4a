"""Gives a decoder graph that ONNX Runtime GenAI's model builder made its embedding and its kernels.

The builder looks tokens up in a float matrix unless it quantized the model itself. Here `GatherBlockQuantized` takes
that place. A tied embedding reads the head's weights: two initializers name the same bytes of the data file, so that
they lie on disk once, and once in memory where the runtime maps the file.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from edgetune.errors import EdgetuneError
from edgetune.export.quantize.checkpoint import EMBEDDING_FILE
from edgetune.export.quantize.grid import Grid, unpacked
from edgetune.export.quantize.kernels import DOMAIN, halve_scales, put_kernels, register
from edgetune.export.quantize.plan import EMBEDDING
from edgetune.export.quantize.rows import put_rows

if TYPE_CHECKING:
    import onnx_ir as ir

_LARGE, _ALIGNMENT = 1 << 23, 65_536  # bytes: a large tensor starts where Windows, too, can map a file
_SMALL = 1_024  # bytes: stays in the graph file


def finish(
    graph_file: Path,
    checkpoint: Path,
    int8: Sequence[str],
    context: int,
    *,
    unsigned: bool = False,
    on_cpu: bool = True,
    plain_lookup: bool = False,
) -> None:
    """Replace the stub embedding and the kernels, and write graph and data file anew, in place.

    Args:
        graph_file: model.onnx, whose weights lie in one file beside it.
        checkpoint: the quantized checkpoint that it was made from.
        int8: full names of the matrices that are to be computed with int8 activations.
        context: the artifact's, in tokens: angles of rotary embeddings are kept for so many positions.
        unsigned: store these matrices as uint8.
        on_cpu: for ONNX Runtime's own CPU provider. For others the zero points of an embedding that has none are written, too: CUDA
            takes them for 0, the CPU for the middle of the codes (microsoft/onnxruntime issue 31692). And scales stay as wide as
            the graph's floats: OpenVINO wants them to be constants, not what a Cast makes of one.
        plain_lookup: write the embedding's numbers out in the graph's floats, for a provider that has no `GatherBlockQuantized`.

    Raises:
        EdgetuneError: the graph is not as the builder makes it.
    """
    import onnx_ir as ir

    model = ir.load(graph_file)
    _put_embedding(model.graph, graph_file, checkpoint, say_zeros=not on_cpu, plain=plain_lookup)
    put_kernels(model.graph, graph_file, int8, unsigned=unsigned)
    if on_cpu:
        halve_scales(model.graph)
    _trim_angles(model.graph, context)
    put_rows(model.graph)
    _save(model, graph_file)


def _put_embedding(graph: ir.Graph, graph_file: Path, checkpoint: Path, *, say_zeros: bool, plain: bool) -> None:
    """Put the quantized lookup, or its numbers written out, in place of the stub."""
    import onnx_ir as ir

    name = f"{EMBEDDING}.weight"
    stub = graph.initializers.get(name)
    lookups = [] if stub is None else [use.node for use in stub.uses()]
    if stub is None or len(lookups) != 1 or lookups[0].op_type != "Gather":
        raise EdgetuneError("the builder's graph has no embedding that can be replaced", where=graph_file)
    lookup = lookups[0]
    apart = (checkpoint / EMBEDDING_FILE).is_file()
    floats = lookup.outputs[0].dtype or ir.DataType.FLOAT
    scales = ir.DataType.FLOAT if plain else floats
    tensors, attributes = _stored_embedding(checkpoint, scales) if apart else _of_head(graph, graph_file)
    if plain:
        numbers = _numbers(tensors, attributes).astype(floats.numpy())
        stub.const_value, stub.shape = ir.tensor(numbers, name=name), ir.Shape(numbers.shape)
        return
    if say_zeros and len(tensors) == 2:
        tensors.append(_middle(tensors[1].shape.numpy(), attributes["bits"]))
    values = register(graph, tensors)
    found = ir.node(
        "GatherBlockQuantized",
        [values[0], lookup.inputs[1], *values[1:]],
        {**attributes, "gather_axis": 0, "quantize_axis": 1},
        domain=DOMAIN,
        name=f"{lookup.name}BlockQuantized",
        outputs=[ir.Value(name=f"{lookup.name}BlockQuantized/output_0", type=lookup.outputs[0].type)],
    )
    found.outputs[0].shape = lookup.outputs[0].shape
    graph.insert_before(lookup, found)
    lookup.outputs[0].replace_all_uses_with(found.outputs[0])
    graph.remove(lookup, safe=True)
    del graph.initializers[name]


def _numbers(tensors: Sequence[Any], attributes: dict[str, int]) -> Any:
    """Codes, scales and, where there are any, zero points of a lookup as the float32 matrix that they stand for."""
    import numpy as np
    import torch

    codes, scales, *zeros = (torch.from_numpy(np.array(tensor.numpy())) for tensor in tensors)
    bits, size = attributes["bits"], attributes["block_size"]
    grid = Grid(bits, size, bool(zeros))
    columns = codes.shape[1] * 8 // bits
    return unpacked(codes, scales.float(), zeros[0] if zeros else None, grid, columns).dequantize().numpy()


def _middle(blocks: Sequence[int], bits: int) -> Any:
    """The zero point of codes that have none of their own, for (rows, blocks) blocks."""
    import numpy as np
    import onnx_ir as ir

    rows, count = blocks
    packed = -(-count * bits // 8)
    return ir.tensor(np.full((rows, packed), 0x88 if bits == 4 else 0x80, np.uint8), name=f"{EMBEDDING}.zeros")


def _trim_angles(graph: ir.Graph, context: int) -> None:
    """Keep the cosines and sines of the positions that the artifact has."""
    import onnx_ir as ir

    for name in ("cos_cache", "sin_cache"):
        value = graph.initializers.get(name)
        if value is not None and value.const_value is not None:
            kept = value.const_value.numpy()[:context].copy()
            value.const_value, value.shape = ir.tensor(kept, name=name), ir.Shape(kept.shape)


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


def _stored_embedding(checkpoint: Path, floats: ir.DataType) -> tuple[list[Any], dict[str, int]]:
    """An untied embedding, from its file; its scales in the floats that the graph computes with."""
    import onnx_ir as ir
    from safetensors import safe_open

    with safe_open(str(checkpoint / EMBEDDING_FILE), "np") as file:
        metadata = file.metadata()
        names = [name for name in ("codes", "scales", "zeros") if name in file.keys()]  # noqa: SIM118 - not a dict
        stored = {name: file.get_tensor(name) for name in names}
        stored["scales"] = stored["scales"].astype(floats.numpy())
        found = [ir.tensor(tensor, name=f"{EMBEDDING}.{name}") for name, tensor in stored.items()]
    return found, {name: int(metadata[name]) for name in ("bits", "block_size")}


def _save(model: ir.Model, graph_file: Path) -> None:
    """Write the data file anew, a tensor at a time and each only once, and the graph."""
    import onnx_ir as ir

    location = f"{graph_file.name}.data"
    old, new = graph_file.parent / location, graph_file.parent / f"{location}.new"
    placed: dict[Any, int] = {}  # where bytes of the old file lie in the new one
    with new.open("wb") as data:
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None:
                continue
            if tensor.nbytes < _SMALL:
                value.const_value = ir.tensor(tensor.numpy().copy(), name=value.name)
                continue
            key = (tensor.offset, tensor.length) if isinstance(tensor, ir.ExternalTensor) else (id(tensor), None)
            store(value, data, placed, key, old)
        data.flush()
        os.fsync(data.fileno())
    new.replace(old)
    ir.save(model, graph_file)


def store(value: ir.Value, data: BinaryIO, placed: dict[Any, int], key: Any, file: Path) -> None:
    """Write an initializer's bytes, unless they lie in the file already, and have the graph read them from there.

    Args:
        value: with a tensor.
        data: the file, open, at its end.
        placed: where tensors lie in it, by key; told of this one.
        key: what two tensors share whose bytes are to lie there once.
        file: the file that the graph is to name.
    """
    import onnx_ir as ir

    tensor = value.const_value
    assert tensor is not None
    if key not in placed:
        data.write(bytes(-data.tell() % (_ALIGNMENT if tensor.nbytes >= _LARGE else 64)))
        placed[key] = data.tell()
        data.write(tensor.tobytes())
    value.const_value = ir.ExternalTensor(
        file.name,
        placed[key],
        tensor.nbytes,
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=value.name or "",
        base_dir=file.parent,
    )
