"""QLoRA's base: linear layers in 4-bit NormalFloat with double quantization (arXiv 2305.14314), by bitsandbytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from edgetune.errors import InputError
from edgetune.models import Base, load_model

if TYPE_CHECKING:
    import torch


def require_bitsandbytes(where: str) -> None:
    """Raise InputError, naming the recipe's key `where`, unless bitsandbytes is installed."""
    if find_spec("bitsandbytes") is None:
        raise InputError("bitsandbytes is not installed", where=where, fix="pip install 'edgetune[qlora]'")


def load_quantized(
    base: Base,
    dtype: torch.dtype,
    *,
    trust_remote_code: bool,
    attention: str | None = None,
    keep: Sequence[str] = (),
    device: str | None = None,
) -> Any:
    """Load a base with its linear layers in NF4, double quantization; the head and what is no linear layer stay.

    Args:
        base: the base model.
        dtype: of the rest of the weights, of what NF4 is made from, and of all products.
        trust_remote_code: run code that the base brings.
        attention: transformers' name of the attention.
        keep: modules that are not quantized, as they are trained whole.
        device: a torch device; this process's GPU, or the CPU where there is none, when None.
    """
    import torch

    require_bitsandbytes("train.method")
    from transformers import BitsAndBytesConfig

    if device is None:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", *keep],
    )
    model = load_model(
        base.path,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        attention=attention,
        quantization=quantization,
        device=device,
    )
    for _, layer in layers(model):
        # On processors with AVX512-BF16, bitsandbytes 0.50 packs a layer's weights anew the first time that it is used in
        # evaluation mode. Packed, they have block sizes rounded to bfloat16 and no backward pass: training that goes on
        # after a validation would silently lose the gradient through the base.
        layer.support_avx512bf16_for_cpu = False
    return model


def layers(model: Any) -> list[tuple[str, Any]]:
    """The NF4 layers of a model by name, under adapters too."""
    from bitsandbytes.nn.modules import Linear4bit

    return [(name, part) for name, part in model.named_modules() if isinstance(part, Linear4bit)]


def dequantized(layer: Any) -> torch.Tensor:
    """The weight (out, in) that an NF4 layer multiplies by, in the dtype that it does so in."""
    import bitsandbytes.functional

    return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def dequantize(model: Any) -> Any:
    """Replace each NF4 layer by a plain linear one with the very weights that it multiplied by; all in float32, on the CPU."""
    import torch

    for name, layer in layers(model):
        plain = torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=torch.float32)
        plain.weight = torch.nn.Parameter(dequantized(layer).float().cpu(), requires_grad=False)
        if layer.bias is not None:
            plain.bias = torch.nn.Parameter(layer.bias.detach().float().cpu(), requires_grad=False)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, plain)
    for mark in ("is_quantized", "is_loaded_in_4bit", "hf_quantizer", "quantization_method"):
        model.__dict__.pop(mark, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model.float().cpu().eval()


def fingerprint(model: Any) -> str:
    """Hex SHA-256 of all NF4 weights: equal for a base that is quantized to the same weights again."""
    found = hashlib.sha256()
    for name, layer in layers(model):
        found.update(name.removeprefix("base_model.model.").removesuffix(".base_layer").encode())
        state = layer.weight.quant_state
        for tensor in (layer.weight.data, state.absmax, state.offset, state.state2.absmax):
            found.update(tensor.detach().cpu().contiguous().flatten().view(-1).numpy().tobytes())
    return found.hexdigest()
