"""What is trained: the adapter, on a frozen base in the dtype that this processor is fast in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgetune.errors import InputError
from edgetune.recipe import TrainSection

if TYPE_CHECKING:
    import torch


def base_dtype(section: TrainSection) -> torch.dtype:
    """The dtype of the frozen base: bfloat16 where the processor multiplies it natively, else float32."""
    import torch

    if section.dtype != "auto":
        return torch.bfloat16 if section.dtype == "bfloat16" else torch.float32
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = any(
            getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        )
    return torch.bfloat16 if native else torch.float32


def add_adapter(model: Any, section: TrainSection) -> Any:
    """Put a LoRA adapter (float32, arXiv 2106.09685) on `model`.

    Returns:
        peft's model: base frozen, adapter trainable.

    Raises:
        InputError: a target module that the model does not have.
    """
    from peft import LoraConfig, get_peft_model

    from edgetune.train import lora

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=section.target_modules,
    )
    if section.target_modules != "all-linear":
        here = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if hasattr(module, "weight")}
        missing = [name for name in section.target_modules if name.rsplit(".", 1)[-1] not in here]
        if missing:
            raise InputError(
                f"the model has no layer {', '.join(missing)}",
                where="train.target_modules",
                fix=f"choose from {', '.join(sorted(n for n in here if not n.isdigit()))}, or all-linear",
            )
    lora.register(config)
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise InputError(
            f"no adapter fits: {str(error).splitlines()[0]}",
            where="train.target_modules",
            fix="use all-linear, or names of linear layers",
        ) from error
