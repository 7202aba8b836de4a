"""An exported graph's weights, read back and compared with the merged model's.

For artifacts whose provider is not on this machine: that the numbers arrived is then known from the file itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.errors import EdgetuneError
from edgetune.export.quantize.weights import Weights

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import torch

# Largest relative error of a matrix (of its Frobenius norm) that rounding can explain; more is a mistake.
_MOST = {"fp32": 1e-6, "fp16": 1e-3, "bf16": 5e-3, "int8": 0.05, "int4": 0.35}
_LAYER = re.compile(r"/model/layers\.(\d+)/(attn|mlp)/(\w+_proj)/MatMul")


def compare_weights(merged: Path, file: Path, precision: str) -> dict[str, Any]:
    """Compare every matrix of a graph with the one that it was made from.

    Args:
        merged: transformers folder.
        file: the graph; its weights lie beside it.
        precision: of the target.

    Returns:
        `matrices` (how many were compared), `not_found` (names of matrices that the merged model has under no known
        name), `worst`: `module` and `relative_error` (‖exported − merged‖ / ‖merged‖).

    Raises:
        EdgetuneError: a matrix has another shape, or differs by more than the precision explains.
    """
    with Weights(merged) as tensors:
        done, missing, worst = 0, [], ("", 0.0)
        for name, matrix in read_weights(file):
            wanted = _merged(tensors, name)
            if wanted is None:
                missing.append(name)
                continue
            error = _difference(matrix, wanted, name, file)
            done, worst = done + 1, max(worst, (name, error), key=lambda entry: entry[1])
    if not worst[1] <= _MOST[precision]:
        raise EdgetuneError(
            f"the weights of {worst[0]} differ from the merged model's by {worst[1]:.1%}, more than {precision} explains",
            where=file.name,
            fix="choose another precision, and report this model",
        )
    return {"matrices": done, "not_found": missing, "worst": {"module": worst[0], "relative_error": round(worst[1], 6)}}


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


def _merged(tensors: Weights, node: str) -> torch.Tensor | None:
    """The merged model's matrix (rows, columns as transformers has them) that a node of the graph was made from."""
    import torch

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
            return tensors.get(both).chunk(2)[last == "up_proj"] if both in tensors else None
    else:
        return None
    if any(name not in tensors for name in names):
        return None
    return torch.cat([tensors.get(name) for name in names])


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
