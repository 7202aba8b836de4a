"""A second graph over the same weights, whose KV cache can be given to it: for prompts that were read before, by another process.

ONNX Runtime GenAI counts the tokens that it has had read, and has no call that puts a KV cache in. Here the whole graph is the
else-branch of an `If`, whose then-branch copies a given cache into the outputs and computes nothing. What it has "read" then is
what the cache holds. Decoding goes through the branch once a step, which was not told apart from the plain graph.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.files import write_bytes
from edgetune.runtime.prompt_cache import GIVEN, GRAPH, SWITCH, state_names

if TYPE_CHECKING:
    import onnx

_BODY, _COPY = "body.", "restored."
_END = (1 << 62) - 1


def write_restore_graph(artifact: Path, config: dict[str, Any]) -> bool:
    """Write `restore.onnx` beside `model.onnx`.

    Args:
        artifact: holds the finished graph, whose weights lie in a file of their own.
        config: genai_config.json.

    Returns:
        Whether it was written: not for a cache that slides, or whose layers are of several shapes or types.
    """
    import onnx

    decoder = config["model"]["decoder"]
    if "sliding_window" in decoder:
        return False
    model = onnx.load(artifact / "model.onnx", load_external_data=False)
    pasts, presents = state_names(decoder)
    inputs = {value.name: value for value in model.graph.input}
    outputs = {value.name: value for value in model.graph.output}
    if not (inputs.keys() >= set(pasts) and outputs.keys() >= set(presents)):
        return False
    if len({_form(inputs[name]) for name in pasts}) != 1:
        return False
    write_bytes(artifact / GRAPH, _wrapped(model, pasts, presents).SerializeToString())
    return True


def _form(value: onnx.ValueInfoProto) -> tuple[int, int, int]:
    """Type, heads and head size of a cache (batch, heads, length, head size); fixed sizes, as the builder writes them."""
    heads, size = (value.type.tensor_type.shape.dim[axis].dim_value for axis in (1, 3))
    return value.type.tensor_type.elem_type, heads, size


def _wrapped(model: onnx.ModelProto, pasts: list[str], presents: list[str]) -> onnx.ModelProto:
    from onnx import TensorProto, helper

    graph = model.graph
    copied = _copying(graph, pasts, presents)
    own = {value.name for value in graph.output}
    for node in graph.node:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                if name in own:
                    names[place] = _BODY + name
    told = [value for value in graph.value_info if value.name not in own]
    body = helper.make_graph(
        list(graph.node), "body", [], [_renamed(one, _BODY) for one in graph.output], value_info=told
    )
    names = [value.name for value in graph.output]
    chosen = helper.make_node("If", [SWITCH], names, "restore", then_branch=copied, else_branch=body)
    kind, heads, size = _form(next(value for value in graph.input if value.name == pasts[0]))
    del graph.node[:], graph.value_info[:]
    graph.node.append(chosen)
    graph.input.append(helper.make_tensor_value_info(SWITCH, TensorProto.BOOL, [1]))
    graph.input.append(
        helper.make_tensor_value_info(GIVEN, kind, [len(pasts), heads or "heads", "given_length", size or "head_size"])
    )
    return model


def _copying(graph: onnx.GraphProto, pasts: list[str], presents: list[str]) -> onnx.GraphProto:
    """The branch that takes a given cache up: it goes in front, what the buffer has behind it stays; other outputs are zeros."""
    import numpy as np
    from onnx import helper, numpy_helper

    parts = [f"{_COPY}part.{place}" for place in range(len(pasts))]
    weights = [
        numpy_helper.from_array(np.array([_END], np.int64), f"{_COPY}end"),
        numpy_helper.from_array(np.array([2], np.int64), f"{_COPY}axis"),
    ]
    nodes = [
        helper.make_node("Shape", [GIVEN], [f"{_COPY}length"], start=2, end=3),
        helper.make_node("Split", [GIVEN], parts, axis=0, num_outputs=len(parts)),
    ]
    for part, past, present in zip(parts, pasts, presents, strict=True):
        bounds = [f"{_COPY}length", f"{_COPY}end", f"{_COPY}axis"]
        nodes.append(helper.make_node("Slice", [past, *bounds], [f"{part}.behind"]))
        nodes.append(helper.make_node("Concat", [part, f"{part}.behind"], [_COPY + present], axis=2))
    for value in graph.output:
        if value.name not in presents:
            name, kind = _COPY + value.name, value.type.tensor_type.elem_type
            sizes = []
            for axis, dim in enumerate(value.type.tensor_type.shape.dim):
                sizes.append(f"{_COPY}length" if dim.dim_param == "sequence_length" else f"{name}.{axis}")
                weights.append(numpy_helper.from_array(np.array([dim.dim_value or 1], np.int64), f"{name}.{axis}"))
            zero = helper.make_tensor("zero", kind, [1], [0])
            nodes.append(helper.make_node("Concat", sizes, [f"{name}.shape"], axis=0))
            nodes.append(helper.make_node("ConstantOfShape", [f"{name}.shape"], [name], value=zero))
    return helper.make_graph(nodes, "copy", [], [_renamed(one, _COPY) for one in graph.output], initializer=weights)


def _renamed(value: onnx.ValueInfoProto, prefix: str) -> onnx.ValueInfoProto:
    import onnx

    found = onnx.ValueInfoProto()
    found.CopyFrom(value)
    found.name = prefix + value.name
    return found
