"""Static 8-bit QDQ graphs for NPUs and FPGAs.

A float32 graph of the model builder is quantized with `onnxruntime.quantization` on calibration rows: 8-bit weights, one
scale a column, and activations of 8 or 16 bits between `QuantizeLinear` and `DequantizeLinear`. It then becomes two
graphs of fixed shapes that share one file of weights: `prefill.onnx` reads a fixed number of tokens of a prompt,
`decode.onnx` one token. Both read and write a KV cache of the whole context in place, and are told by two numbers how
much of it is filled: https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.errors import EdgetuneError, InputError, first_line
from edgetune.export.targets import StaticShapes
from edgetune.files import write_json

if TYPE_CHECKING:
    import numpy as np
    import onnx

PREFILL, DECODE, WEIGHTS = "prefill.onnx", "decode.onnx", "model.onnx.data"
FILLED, TOTAL = "past_seq_len", "total_seq_len"
# What is left to the CPU computes in floats between its roundings, as the standard says: products of int8 overflow on some.
SESSION = {"session.disable_quant_qdq": "1"}
LEAST_TOKENS = 256  # fewer do not show what the activations may be
MOST_ROWS, MOST_TOKENS = 64, 512


def to_static(folder: Path, shapes: StaticShapes, context: int, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Replace the builder's float32 graph in `folder` by two static, quantized ones, and say so in genai_config.json.

    Args:
        folder: has `model.onnx`, its weights and `genai_config.json`.
        shapes: tokens of a prompt that are read at once, bits of activations.
        context: tokens of the KV cache.
        rows: token ids of calibration rows.

    Returns:
        For the report: `prefill`, `context`, `activation_bits`, `calibration_rows`, `calibration_tokens`.

    Raises:
        InputError: too few calibration tokens, a context that the prefill length does not divide, or a model whose
            attention is not one operator.
        EdgetuneError: ONNX Runtime cannot quantize the graph.
    """
    import onnx

    used = [list(row[:MOST_TOKENS]) for row in rows[:MOST_ROWS]]
    tokens = sum(map(len, used))
    require_tokens(tokens)
    require_context(shapes, context)
    config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    quantized = folder / "quantized.onnx"
    _quantize(folder / "model.onnx", quantized, shapes, [*_feeds(used, config)])
    for file in (folder / "model.onnx", folder / WEIGHTS):
        file.unlink(missing_ok=True)
    model = onnx.load(quantized, load_external_data=False)
    _rename_weights(model, quantized.with_name("quantized.onnx.data"), folder / WEIGHTS)
    for name, length in ((PREFILL, shapes.prefill), (DECODE, 1)):
        onnx.save(fixed(model, length, context), folder / name)
    quantized.unlink()
    write_json(folder / "genai_config.json", _pipeline(config, shapes, context))
    return {
        "prefill": shapes.prefill,
        "context": context,
        "activation_bits": shapes.activation_bits,
        "calibration_rows": len(used),
        "calibration_tokens": tokens,
    }


def require_tokens(tokens: int, where: str = "data.train") -> None:
    """Raise InputError where calibration rows of so many tokens are too few; `where` is their place."""
    if tokens < LEAST_TOKENS:
        raise InputError(
            f"static quantization needs at least {LEAST_TOKENS} tokens of calibration rows, not {tokens}",
            where=where,
            fix="give more rows, or choose a target without fixed shapes",
        )


def require_context(shapes: StaticShapes, context: int) -> None:
    """Raise InputError where the prompt's pieces do not fill the context (tokens) up."""
    if context % shapes.prefill:
        raise InputError(
            f"the context of {context} tokens is no multiple of the {shapes.prefill} that are read at once",
            where="export.max_length",
            fix=f"set it to {max(1, context // shapes.prefill) * shapes.prefill}",
        )


def _feeds(rows: Sequence[list[int]], config: dict[str, Any]) -> Iterator[dict[str, np.ndarray]]:
    """What the builder's graph reads, a row at a time, with an empty KV cache."""
    import numpy as np

    decoder = config["model"]["decoder"]
    shape = (1, decoder["num_key_value_heads"], 0, decoder["head_size"])
    past = {
        f"past_key_values.{layer}.{kind}": np.zeros(shape, np.float32)
        for layer in range(decoder["num_hidden_layers"])
        for kind in ("key", "value")
    }
    for row in rows:
        yield {"input_ids": np.array([row], np.int64), "attention_mask": np.ones((1, len(row)), np.int64), **past}


def _quantize(file: Path, out: Path, shapes: StaticShapes, feeds: list[dict[str, np.ndarray]]) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Rows(CalibrationDataReader):
        def __init__(self) -> None:
            self._left = iter(feeds)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._left, None)

    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # it advises everyone to preprocess, through the root logger
    try:
        quantize_static(
            str(file),
            str(out),
            Rows(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QUInt8 if shapes.activation_bits == 8 else QuantType.QUInt16,
            use_external_data_format=True,
            # A product of two activations stays in floats: only those with weights are quantized.
            extra_options={
                "MatMulConstBOnly": True,
                "WeightSymmetric": True,
                "ActivationSymmetric": False,
                "TensorQuantOverrides": _overrides(file, shapes),
            },
        )
    except (RuntimeError, ValueError, KeyError, AttributeError) as error:
        raise EdgetuneError(
            f"ONNX Runtime cannot quantize the graph: {first_line(error)}", where="export", fix="report this model"
        ) from error
    finally:
        logger.setLevel(level)


def _overrides(file: Path, shapes: StaticShapes) -> dict[str, list[dict[str, Any]]]:
    """Types of what modules with bits of their own read and write, by tensor, as ONNX Runtime's quantizer takes them."""
    import onnx
    from onnxruntime.quantization import QuantType

    kinds = {8: QuantType.QUInt8, 16: QuantType.QUInt16}
    found: dict[str, list[dict[str, Any]]] = {}
    for node in onnx.load(file, load_external_data=False).graph.node:
        module = node.name.split("/")[-2] if node.op_type == "MatMul" and "/" in node.name else ""
        if (bits := shapes.modules.get(module)) not in (None, shapes.activation_bits):
            found |= {tensor: [{"quant_type": kinds[bits]}] for tensor in (node.input[0], node.output[0])}
    return found


def _rename_weights(model: onnx.ModelProto, old: Path, new: Path) -> None:
    old.rename(new)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = new.name


def fixed(model: onnx.ModelProto, length: int, context: int) -> onnx.ModelProto:
    """A copy of the builder's graph whose shapes are fixed.

    Args:
        model: with the inputs input_ids, attention_mask and past_key_values.*, weights outside.
        length: tokens that it reads at once.
        context: tokens of the KV cache that it reads and writes.

    Returns:
        Inputs: input_ids (1, length) int64, padded on the right; total_seq_len (1,) int32, tokens in the cache after
        this call, padding left out; past_seq_len (1, 1) int32, one less; the caches (1, heads, context, head size).

    Raises:
        InputError: attention is not `GroupQueryAttention`.
    """
    import onnx
    from onnx import TensorProto, helper

    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    attention = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    if not attention:
        raise InputError(
            "the model's attention is not GroupQueryAttention, which fixed shapes are made from",
            where="export.target",
            fix="choose a target without fixed shapes",
        )
    filled, total = (FILLED, TOTAL) if length == 1 else _whole_window(graph, length)
    for node in attention:
        node.input[5], node.input[6] = filled, total
    del graph.value_info[:]  # they name the free dimensions
    kept = [value for value in graph.input if value.name != "attention_mask"]
    del graph.input[:]
    graph.input.extend(kept)
    graph.input.append(helper.make_tensor_value_info(FILLED, TensorProto.INT32, [1, 1]))
    graph.input.append(helper.make_tensor_value_info(TOTAL, TensorProto.INT32, [1]))
    heads, size = _cache_shape(attention[0], model)
    for value in (*graph.input, *graph.output):
        if value.name == "input_ids":
            _set_shape(value, (1, length))
        elif value.name == "logits":
            _set_shape(value, (1, length, value.type.tensor_type.shape.dim[2].dim_value))
        elif value.name.startswith(("past_key_values.", "present.")):
            _set_shape(value, (1, heads, context, size))
    _drop_unused(graph)
    return made


def _whole_window(graph: onnx.GraphProto, length: int) -> tuple[str, str]:
    """The two numbers for attention over a padded window: it fills the cache to a multiple of `length`.

    What padding leaves there is never attended to, and the tokens that follow overwrite it.
    """
    from onnx import TensorProto, helper

    for name, value in (("window/one", 1), ("window/length", length)):
        graph.initializer.append(helper.make_tensor(name, TensorProto.INT32, [1], [value]))
    steps = [
        ("Sub", TOTAL, "window/one", "window/last"),
        ("Div", "window/last", "window/length", "window/before"),
        ("Add", "window/before", "window/one", "window/count"),
        ("Mul", "window/count", "window/length", "window/total"),
        ("Sub", "window/total", "window/one", "window/filled"),
    ]
    for at, (op, left, right, out) in enumerate(steps):
        graph.node.insert(at, helper.make_node(op, [left, right], [out], f"/{out}"))
    return "window/filled", "window/total"


def _cache_shape(attention: onnx.NodeProto, model: onnx.ModelProto) -> tuple[int, int]:
    """Heads of the KV cache and their size."""
    given = {entry.name: entry.i for entry in attention.attribute}
    for tensor in model.graph.initializer:  # the rotary cache has half a head a row; models without it say it below
        if tensor.name == attention.input[7]:
            return given["kv_num_heads"], 2 * tensor.dims[1]
    raise InputError("does not say the size of its heads", where="model.onnx", fix="report this model")


def _set_shape(value: onnx.ValueInfoProto, shape: Sequence[int]) -> None:
    dims = value.type.tensor_type.shape.dim
    del dims[:]
    for size in shape:
        dims.add().dim_value = size


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Remove nodes and weights that no output needs."""
    wanted = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if wanted & set(node.output):
            wanted.update(node.input)
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    weights = [tensor for tensor in graph.initializer if tensor.name in wanted]
    del graph.initializer[:]
    graph.initializer.extend(weights)


def _pipeline(config: dict[str, Any], shapes: StaticShapes, context: int) -> dict[str, Any]:
    """genai_config.json with the two graphs as ONNX Runtime GenAI's decoder pipeline."""
    decoder = dict(config["model"]["decoder"])
    decoder.pop("filename", None)
    layers = range(decoder["num_hidden_layers"])
    caches = [name % layer for name in ("past_key_values.%d.key", "past_key_values.%d.value") for layer in layers]
    inputs = ["input_ids", FILLED, TOTAL, *caches]
    outputs = ["logits", *(name.replace("past_key_values", "present") for name in caches)]
    decoder["inputs"] = {
        **{key: name for key, name in decoder["inputs"].items() if key != "attention_mask"},
        "past_sequence_length": FILLED,
        "total_sequence_length": TOTAL,
    }
    decoder["sliding_window"] = {
        "window_size": shapes.prefill,
        "pad_value": 0,
        "alignment": "left",
        "slide_key_value_cache": False,
    }
    decoder["session_options"] = {**decoder.get("session_options", {}), **SESSION}
    stage = {"inputs": inputs, "outputs": outputs}
    decoder["pipeline"] = [
        {
            "prefill": {"filename": PREFILL, **stage, "run_on_prompt": True, "run_on_token_gen": False},
            "decode": {"filename": DECODE, **stage, "run_on_prompt": False, "run_on_token_gen": True},
        }
    ]
    model = {**config["model"], "type": "decoder-pipeline", "decoder": decoder, "context_length": context}
    return {**config, "model": model}
