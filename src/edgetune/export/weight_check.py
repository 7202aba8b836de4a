"""An exported graph's weights, read back and compared with the merged model's.

For artifacts whose provider is not on this machine: that the numbers arrived is then known from the file itself.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.errors import EdgetuneError, GateError
from edgetune.export.quantize.weights import Weights

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import torch

# Largest relative error of a matrix (of its Frobenius norm) that rounding can explain; more is a mistake.
_MOST = {"fp32": 1e-6, "fp16": 1e-3, "bf16": 5e-3, "int8": 0.05, "int4": 0.35}
_MOST_OF_TYPE = {1: "fp32", 10: "fp16", 16: "bf16"}  # norms and biases are not quantized: by ONNX's numbers of types
_LAYER = re.compile(r"/model/layers\.(\d+)/(attn|mlp)/(\w+_proj)/MatMul")
_VECTOR = re.compile(r"(?:model|lm_head)\.[\w.]*(?:weight|bias)")  # what the builder calls norms and biases


def compare_weights(merged: Path, file: Path, precision: str, smoothed: Collection[str] = ()) -> dict[str, Any]:
    """Compare every matrix, norm and bias of a graph with the one that it was made from.

    Args:
        merged: transformers folder.
        file: the graph; its weights lie beside it.
        precision: of the target.
        smoothed: full names of matrices that were scaled before they were rounded: neither they nor the norms of their
            layers are the merged model's any more, and they are left out.

    Returns:
        `matrices` and `vectors` (how many were compared), `smoothed` (how many were left out), `not_found` (names of what
        the merged model has under no known name), `worst`: `module` and `relative_error` of a matrix
        (‖exported − merged‖ / ‖merged‖).

    Raises:
        GateError: a weight differs by more than its precision explains.
        EdgetuneError: one has another shape, or nothing could be compared.
    """
    changed = {name.rpartition(".self_attn")[0] or name.rpartition(".mlp")[0] for name in smoothed}
    missing: list[str] = []
    matrices, vectors, left_out, worst = 0, 0, 0, ("", 0.0)
    with Weights(merged) as tensors:
        for name, matrix in read_weights(file):
            names, wanted = _merged(tensors, name)
            if any(one.removesuffix(".weight") in smoothed for one in names):
                left_out += 1
            elif wanted is None:
                missing.append(name)
            else:
                error = _difference(matrix, wanted, name, file)
                matrices, worst = matrices + 1, max(worst, (name, error), key=lambda entry: entry[1])
        for name, vector, kind in read_vectors(file):
            names = _vector_names(tensors, name)
            if any(names and names[0].startswith(f"{layer}.") for layer in changed):
                left_out += 1
            elif not names:
                missing.append(name)
            else:
                _check_vector(vector, _joined(tensors, names), name, kind, file)
                vectors += 1
    if not worst[1] <= _MOST[precision]:
        raise _differs(worst[0], worst[1], precision, file)
    if not matrices:
        raise EdgetuneError(
            f"not one of the graph's weights could be compared with the merged model's: {len(missing)} are called otherwise"
            + (f", {missing[0]} first" if missing else ""),
            where=file.name,
            fix="report this model; `edgetune verify` compares what it computes, on a machine that runs the graph",
        )
    return {
        "matrices": matrices,
        "vectors": vectors,
        "smoothed": left_out,
        "not_found": missing,
        "worst": {"module": worst[0], "relative_error": round(worst[1], 6)},
    }


def _differs(name: str, error: float, precision: str, file: Path) -> GateError:
    return GateError(
        f"the weights of {name} differ from the merged model's by {error:.1%}, more than the {_MOST[precision]:.1%} that "
        f"{precision} explains; the artifact was not kept",
        where=file.name,
        fix="choose a target of higher precision, and report this model",
    )


def _check_vector(vector: np.ndarray, wanted: torch.Tensor, name: str, kind: int, file: Path) -> None:
    """Raise GateError where a norm or a bias is another one. Some models' norms lack the 1 that the builder adds."""
    precision = _MOST_OF_TYPE[kind]
    error = _difference(vector, wanted, name, file)
    if name.endswith(".weight"):
        error = min(error, _difference(vector, wanted + 1, name, file))
    if not error <= _MOST[precision]:
        raise _differs(name, error, precision, file)


def _vector_names(tensors: Weights, name: str) -> list[str]:
    """What a norm or a bias of the graph is called in the merged model, its parts in order; empty where it has none such."""
    name = name.replace(".Add.bias", ".bias").replace(".attn.", ".self_attn.").replace(".layernorm.", ".")
    if ".final_norm_layernorm." in name:
        name = f"model.norm.{name.rpartition('.')[2]}"
    names = [name]
    if name not in tensors and ".qkv_proj." in name:
        names = [name.replace(".qkv_proj.", f".{which}_proj.") for which in "qkv"]
    return names if all(one in tensors for one in names) else []


def _joined(tensors: Weights, names: list[str]) -> torch.Tensor:
    import torch

    return torch.cat([tensors.get(name) for name in names])


def _difference(matrix: np.ndarray, wanted: torch.Tensor, name: str, file: Path) -> float:
    import torch

    found = torch.from_numpy(matrix)
    if found.shape != wanted.shape:
        raise EdgetuneError(
            f"{name} is {tuple(found.shape)}, the merged model's is {tuple(wanted.shape)}",
            where=file.name,
            fix="report this model",
        )
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))


def _merged(tensors: Weights, node: str) -> tuple[list[str], torch.Tensor | None]:
    """The merged model's matrix (rows, columns as transformers has them) that a node of the graph was made from, and the names
    of its parts; None where it has none."""
    if node.startswith("/model/embed_tokens/"):
        names = ["model.embed_tokens.weight"]
    elif node.startswith("/lm_head/"):
        names = ["lm_head.weight" if "lm_head.weight" in tensors else "model.embed_tokens.weight"]
    elif (found := _LAYER.match(node)) is not None:
        layer, part, last = found.groups()
        before = f"model.layers.{layer}.{'self_attn' if part == 'attn' else 'mlp'}"
        names = [f"{before}.{last}.weight"]
        if names[0] not in tensors and last == "qkv_proj":
            names = [f"{before}.{which}_proj.weight" for which in "qkv"]
        elif names[0] not in tensors and last in ("gate_proj", "up_proj"):
            both = f"{before}.gate_up_proj.weight"  # fused in the merged model, two matrices in the graph
            return names, tensors.get(both).chunk(2)[last == "up_proj"] if both in tensors else None
    else:
        return [], None
    return names, _joined(tensors, names) if all(name in tensors for name in names) else None


def read_vectors(file: Path) -> Iterator[tuple[str, np.ndarray, int]]:
    """Every norm and bias of a graph by its name: float32, and ONNX's number of the type that it has there."""
    import numpy as np
    import onnx

    graph = onnx.load(file, load_external_data=False).graph
    held = _Held({tensor.name: tensor for tensor in graph.initializer}, file.parent)
    for tensor in graph.initializer:
        if len(tensor.dims) == 1 and tensor.data_type in _MOST_OF_TYPE and _VECTOR.fullmatch(tensor.name):
            yield tensor.name, held.array(tensor.name).astype(np.float32), tensor.data_type


def read_weights(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every matrix of a graph, by its node's name, float32, (outputs, inputs); an embedding is (tokens, size).

    Dequantized where it is quantized: `MatMulNBits`, and `DequantizeLinear` in front of `MatMul`, `Gemm`, `Gather`.
    One matrix at a time is in memory.
    """
    import onnx

    graph = onnx.load(file, load_external_data=False).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    widened = {node.output[0]: tensors.get(node.input[0]) for node in graph.node if node.op_type == "Cast"}
    held = _Held(tensors | {name: tensor for name, tensor in widened.items() if tensor is not None}, file.parent)
    dequantized = {node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    for node in graph.node:
        given = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
        if node.op_type == "MatMulNBits":
            yield node.name, held.unpacked(node, given)
        elif node.op_type in ("MatMul", "Gemm", "Gather"):
            name = node.input[0 if node.op_type == "Gather" else 1]
            matrix = held.matrix(name, dequantized)
            if matrix is not None:
                yield node.name, matrix if node.op_type == "Gather" or given.get("transB") else matrix.T


class _Held:
    """The tensors that lie in a graph or beside it."""

    def __init__(self, tensors: dict[str, onnx.TensorProto], folder: Path) -> None:
        self._tensors, self._folder = tensors, folder

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def array(self, name: str) -> np.ndarray:
        from onnx import numpy_helper

        return numpy_helper.to_array(self._tensors[name], str(self._folder))

    def matrix(self, name: str, dequantized: dict[str, onnx.NodeProto]) -> np.ndarray | None:
        """A two-dimensional weight in float32, None where `name` is no weight."""
        import numpy as np
        import onnx

        if name in self and len(self._tensors[name].dims) == 2:
            return self.array(name).astype(np.float32)
        node = dequantized.get(name)
        if node is None or node.input[0] not in self or len(self._tensors[node.input[0]].dims) != 2:
            return None
        given = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
        codes, scales = (self.array(node.input[i]).astype(np.float32) for i in (0, 1))
        points = self.array(node.input[2]).astype(np.float32) if len(node.input) > 2 and node.input[2] else 0 * scales
        if scales.size > 1 and given.get("axis", 1) % 2 == 0:
            scales, points = scales.reshape(-1, 1), points.reshape(-1, 1)
        return np.asarray((codes - points) * scales)

    def unpacked(self, node: onnx.NodeProto, given: dict[str, Any]) -> np.ndarray:
        """A `MatMulNBits` weight (outputs, inputs) in float32: lower four bits first, scales by block of inputs."""
        import numpy as np

        bits, block, rows, columns = (int(given[name]) for name in ("bits", "block_size", "N", "K"))
        blocks = -(-columns // block)

        def codes(name: str, length: int) -> np.ndarray:
            packed = self.array(name).view(np.uint8).reshape(rows, -1)
            if bits == 4:
                packed = np.stack([packed & 15, packed >> 4], -1).reshape(rows, -1)
            return packed[:, :length].astype(np.float32)

        values = codes(node.input[1], blocks * block).reshape(rows, blocks, block)
        points = node.input[3] if len(node.input) > 3 else ""
        zero = codes(points, blocks)[:, :, None] if points else np.float32(2 ** (bits - 1))
        scales = self.array(node.input[2]).astype(np.float32).reshape(rows, blocks, 1)
        return np.asarray(((values - zero) * scales).reshape(rows, -1)[:, :columns])
