"""Branches in a graph that compute adapters, and the files that hold what they compute with.

Beside each product W·x that an adapter has a part in stands B·(A·x), with A and B as inputs of the graph. Their default
has rank 0, so that without an adapter the graph gives the base's numbers. ONNX Runtime takes the values from an
`.onnx_adapter` file for each call (`RunOptions.add_active_adapter`; in ONNX Runtime GenAI `Generator.set_active_adapter`):
https://onnxruntime.ai/docs/genai/tutorials/finetune.html

Where the graph computes several matrices in one product (queries, keys and values), their A stand side by side and
their B on the diagonal of one, so that the branch, too, is one pair of products.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.errors import EdgetuneError, InputError
from edgetune.export.adapters.read import KEY, Adapter
from edgetune.export.quantize.plan import HEAD, parts_of
from edgetune.export.quantize.smooth import Folded

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

_LAYER = re.compile(r"/model/layers\.(\d+)/(attn|mlp)/(\w+_proj)/(?!lora)")
_PRODUCTS = ("MatMul", "MatMulNBits", "DynamicQuantizeMatMul")
_VERSION = 1  # of the adapters and of the graph that they fit; ONNX Runtime stores both and compares neither


@dataclass(frozen=True)
class Product:
    """A product of the graph that gets a branch.

    Attributes:
        name: of the branch's inputs, such as `layers.0.self_attn.qkv_proj`.
        columns: numbers that it reads.
        parts: full names of the matrices in it, and how many numbers each gives.
    """

    name: str
    columns: int
    parts: tuple[tuple[str, int], ...]


def add_branches(graph_file: Path, adapters: Sequence[Adapter], config: Any) -> list[Product]:
    """Give a graph a branch beside each product that one of the adapters has a part in, in place.

    Args:
        graph_file: model.onnx, as it is exported otherwise.
        adapters: all that the artifact will carry.
        config: the base's transformers configuration.

    Raises:
        InputError: the graph has no product of its own for a layer of an adapter, or one of another size.
    """
    import onnx_ir as ir

    model = ir.load(graph_file)
    wanted = {part: adapter.name for adapter in adapters for part in adapter.parts}
    products = []
    for node in list(model.graph):
        product = _product(node, config)
        if product is not None and any(part in wanted for part, _ in product.parts):
            _check(product, adapters)
            _branch(model.graph, node, product)
            products.append(product)
    for part in (part for product in products for part, _ in product.parts):
        wanted.pop(part, None)
    if wanted:
        part, name = next(iter(wanted.items()))
        raise InputError(
            f"the adapter {name} has a part in {part}, which this model's graph does not compute by itself",
            where=KEY,
            fix="merge the adapter (export.adapters: merged), or train it on other layers (train.target_modules)",
        )
    ir.save(model, graph_file)
    return products


def write_adapter(file: Path, adapter: Adapter, products: Sequence[Product], folded: Folded) -> None:
    """Write an adapter as a file that ONNX Runtime switches on.

    Args:
        file: NAME.onnx_adapter.
        adapter: what is written.
        products: of the graph.
        folded: what the base's inputs and outputs were divided by.
    """
    from edgetune.runtime import genai

    genai()  # telemetry off before ONNX Runtime is imported
    from onnxruntime import AdapterFormat, OrtValue

    values = {
        name: OrtValue.ortvalue_from_numpy(tensor.numpy())
        for product in products
        for name, tensor in _values(adapter, product, folded)
    }
    found = AdapterFormat()
    found.set_adapter_version(_VERSION)
    found.set_model_version(_VERSION)
    found.set_parameters(values)
    found.export_adapter(str(file.absolute()))


def without_branches(graph_file: Path, out: Path) -> None:
    """Write a graph as it was before `add_branches`; its weights stay where they are."""
    import onnx_ir as ir

    model = ir.load(graph_file)
    graph = model.graph
    for node in [node for node in graph if (node.name or "").endswith("/lora/Add")]:
        base, added = node.inputs
        assert base is not None and added is not None
        node.outputs[0].replace_all_uses_with(base)
        second = added.producer()
        assert second is not None
        first = second.inputs[0]
        assert first is not None
        for old in (node, second, first.producer()):
            assert old is not None
            graph.remove(old, safe=True)
    names = {value.name for value in graph.inputs if value.name in graph.initializers}
    for name in names:
        del graph.initializers[name or ""]
    kept = [value for value in graph.inputs if value.name not in names]
    graph.inputs.clear()
    graph.inputs.extend(kept)
    ir.save(model, out)


def _product(node: ir.Node, config: Any) -> Product | None:
    """What a node multiplies with, None where it is no product of a layer or of the head."""
    import torch

    if node.op_type not in _PRODUCTS:
        return None
    name = node.name or ""
    layer = _LAYER.match(name)
    if layer is None and not name.startswith("/lm_head/MatMul"):
        return None
    owner = HEAD
    if layer is not None:
        owner = f"layers.{layer[1]}.{'self_attn' if layer[2] == 'attn' else 'mlp'}.{layer[3]}"
    full = owner if layer is None else f"model.{owner}"
    if "N" in node.attributes:
        columns, rows = node.attributes["K"].as_int(), node.attributes["N"].as_int()
    else:
        shape = node.inputs[1].shape if node.inputs[1] is not None else None
        if shape is None or len(shape) != 2:
            return None
        columns, rows = (int(size) for size in shape.numpy())
    pieces = parts_of(full, torch.empty(rows, 0), config)
    return Product(owner, columns, tuple((part, len(piece)) for part, piece in pieces))


def _check(product: Product, adapters: Sequence[Adapter]) -> None:
    for adapter in adapters:
        for part, rows in product.parts:
            pair = adapter.parts.get(part)
            if pair is not None and (pair[0].shape[1], len(pair[1])) != (product.columns, rows):
                raise InputError(
                    f"the adapter's {part} is for {pair[0].shape[1]} inputs and {len(pair[1])} outputs, the base's has "
                    f"{product.columns} and {rows}",
                    where=adapter.folder,
                    fix="give the base that it was trained on",
                )


def _branch(graph: ir.Graph, node: ir.Node, product: Product) -> None:
    """Put A, B and the sum behind a product."""
    import numpy as np
    import onnx_ir as ir

    out, read = node.outputs[0], node.inputs[0]
    if read is None or out.dtype not in (None, ir.DataType.FLOAT):
        raise EdgetuneError(f"{node.name} computes in {out.dtype}, where adapters are 32-bit floats", where=KEY)
    rows, rank = sum(rows for _, rows in product.parts), f"{product.name}.rank"
    given = []
    for last, shape in (("lora_A", (product.columns, rank)), ("lora_B", (rank, rows))):
        # Of rank 0, which the CPU computes right and fast; CUDA and DirectML did not (microsoft/onnxruntime issue 21483).
        nothing = np.zeros([size if isinstance(size, int) else 0 for size in shape], np.float32)
        name = f"{product.name}.{last}"
        value = ir.Value(
            name=name,
            const_value=ir.tensor(nothing, name=name),
            shape=ir.Shape(shape),
            type=ir.TensorType(ir.DataType.FLOAT),
        )
        graph.register_initializer(value)
        graph.inputs.append(value)
        given.append(value)
    where = f"/{product.name}" if product.name == HEAD else f"/model/{product.name}".replace("self_attn", "attn")
    where = re.sub(r"layers\.(\d+)\.(\w+)\.", r"layers.\1/\2/", where)
    low = ir.node("MatMul", [read, given[0]], name=f"{where}/lora_A/MatMul")
    high = ir.node("MatMul", [low.outputs[0], given[1]], name=f"{where}/lora_B/MatMul")
    total = ir.Value(name=f"{where}/lora/Add/output_0", type=out.type, shape=out.shape)
    low.outputs[0].name, high.outputs[0].name = f"{where}/lora_A/output_0", f"{where}/lora_B/output_0"
    for made, width in ((low.outputs[0], rank), (high.outputs[0], rows)):
        made.type = out.type
        if out.shape is not None:
            made.shape = ir.Shape([*out.shape[:-1], width])
    if out.is_graph_output():  # the head's: the output keeps its name
        total.name, out.name = out.name, f"{where}/base"
    out.replace_all_uses_with(total, replace_graph_outputs=True)
    add = ir.node("Add", [out, high.outputs[0]], name=f"{where}/lora/Add", outputs=[total])
    graph.insert_after(node, [low, high, add])


def _values(adapter: Adapter, product: Product, folded: Folded) -> Iterator[tuple[str, torch.Tensor]]:
    """A (columns, rank) and B (rank, rows) of one branch; none where the adapter has no part in the product."""
    import torch

    firsts: dict[int, torch.Tensor] = {}  # parts of a fused matrix share their A
    for part, _ in product.parts:
        if part in adapter.parts:
            a = adapter.parts[part][0]
            firsts[id(a)] = a if part not in folded.columns else a * folded.columns[part]
    if not firsts:
        return
    starts, rank = {}, 0
    for key, a in firsts.items():
        starts[key] = rank
        rank += len(a)
    low = torch.cat(list(firsts.values())).T.contiguous()
    high, row = torch.zeros(rank, sum(rows for _, rows in product.parts)), 0
    for part, rows in product.parts:
        if part in adapter.parts:
            a, b = adapter.parts[part]
            if part in folded.rows:
                b = b.clone()
                b[-len(folded.rows[part]) :] /= folded.rows[part][:, None]
            start = starts[id(a)]
            high[start : start + len(a), row : row + rows] = b.T
        row += rows
    yield f"{product.name}.lora_A", low
    yield f"{product.name}.lora_B", high
