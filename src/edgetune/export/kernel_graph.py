"""Makes `edgetune/runtime/kernels.onnx`, the small products that `edgetune.runtime.kernels` checks a processor with.

python -m edgetune.export.kernel_graph
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgetune.runtime import kernels

if TYPE_CHECKING:
    import onnx


def graph() -> onnx.ModelProto:
    """One input, and an output for each kernel, by its name."""
    import torch
    from onnx import TensorProto, helper, numpy_helper

    from edgetune.export.quantize.grid import Grid, Quantized

    nodes, stored, outputs = [], [], []
    for kernel in kernels.KERNELS:
        codes, scales, zeros = kernels.weights(kernel)
        grid = Grid(kernel.bits, kernel.block, kernel.zero_points)
        if kernel.activations == "int8":
            tensors = [(codes ^ 0x80).view("int8").T.copy(), scales[:, 0]]
            attributes = {}
        else:
            found = Quantized(
                grid,
                torch.from_numpy(codes),
                torch.from_numpy(scales),
                torch.from_numpy(zeros) if kernel.zero_points else None,
            )
            packed = found.packed_zeros()
            tensors = [found.packed_codes().numpy(), scales, *([] if packed is None else [packed.numpy()])]
            attributes = {
                "K": kernels.COLUMNS,
                "N": kernels.ROWS,
                "bits": kernel.bits,
                "block_size": kernel.block,
                "accuracy_level": 4,
            }
        names = [f"{kernel.name} {number}" for number in range(len(tensors))]
        stored += [numpy_helper.from_array(tensor, name) for tensor, name in zip(tensors, names, strict=True)]
        nodes.append(
            helper.make_node(kernel.op, ["inputs", *names], [kernel.name], domain="com.microsoft", **attributes)
        )
        outputs.append(helper.make_tensor_value_info(kernel.name, TensorProto.FLOAT, ["rows", kernels.ROWS]))
    given = helper.make_tensor_value_info("inputs", TensorProto.FLOAT, ["rows", kernels.COLUMNS])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(
        helper.make_graph(nodes, "kernels", [given], outputs, stored), opset_imports=opsets, ir_version=10
    )


def main() -> None:
    """Write the file."""
    path = Path(kernels.__file__).with_name("kernels.onnx")
    path.write_bytes(graph().SerializeToString())


if __name__ == "__main__":
    main()
