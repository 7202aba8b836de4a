"""The optimizer and its learning rate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgetune.recipe import TrainSection
from edgetune.train.quantize import require_bitsandbytes

if TYPE_CHECKING:
    import torch

_SMALL, _LARGE = 1_000_000_000, 20_000_000_000  # parameters


def default_learning_rate(section: TrainSection, parameters: int) -> float:
    """The peak learning rate: the recipe's, else one that fits method and model, times `learning_rate_multiplier`.

    Adapters: 2e-4 up to 20 billion parameters and 1e-4 above, as the LoRA paper (2e-4 for GPT-2 and GPT-3, arXiv
    2106.09685, appendix D) and the QLoRA paper (2e-4 up to 13 billion, 1e-4 for 33 and 65 billion, arXiv 2305.14314,
    table 9) used. All weights: 5e-5 below a billion parameters (the rate of BERT-sized fine-tuning, arXiv 1810.04805,
    appendix A.3), 2e-5 up to 20 billion (Llama 2's fine-tuning, arXiv 2307.09288, section 3.1) and 1e-5 above. From a
    billion on that is a tenth of an adapter's, the ratio that "LoRA Without Regret" (Thinking Machines, 2025) measured.

    Args:
        section: the recipe's `train`.
        parameters: of the whole model.
    """
    if section.learning_rate is not None:
        rate = section.learning_rate
    elif section.method == "full":
        rate = 5e-5 if parameters < _SMALL else 2e-5 if parameters < _LARGE else 1e-5
    else:
        rate = 2e-4 if parameters < _LARGE else 1e-4
    return rate * section.learning_rate_multiplier


def make_optimizer(model: Any, section: TrainSection, learning_rate: float) -> torch.optim.Optimizer:
    """The optimizer of all that `model` trains.

    Its state is float32 (8 bits for weights over 4,096 numbers with `adamw_8bit`), and resumes bit for bit.

    Args:
        model: from `edgetune.train.method.build`.
        section: the recipe's `train`.
        learning_rate: the peak.

    Raises:
        InputError: `adamw_8bit` without bitsandbytes.
    """
    import torch

    groups = parameter_groups(model, section, learning_rate)
    if section.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        # Neither its own schedule nor its own scale: the recipe's learning rate means here what it means elsewhere.
        return Adafactor(groups, lr=learning_rate, scale_parameter=False, relative_step=False, warmup_init=False)
    if section.optimizer == "adamw_8bit":
        require_bitsandbytes("train.optimizer")
        from bitsandbytes.optim.adamw import AdamW8bit

        return AdamW8bit(groups, lr=learning_rate)
    device = groups[0]["params"][0].device.type
    return torch.optim.AdamW(groups, lr=learning_rate, fused=device in ("cpu", "cuda", "xpu", "mps"))


def parameter_groups(model: Any, section: TrainSection, learning_rate: float) -> list[dict[str, Any]]:
    """What is trained, in groups of one learning rate and one weight decay; none is empty.

    Weights with one axis (norms, biases, DoRA's lengths) do not decay. With LoRA+ each layer's B learns faster than the
    rest by `lora_plus_ratio`; an embedding's does not.
    """
    groups: dict[tuple[bool, bool], list[Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = len(getattr(parameter, "ds_shape", parameter.shape)) > 1  # DeepSpeed's stage 3 empties the shape
            groups.setdefault((decays, ".lora_B." in name), []).append(parameter)
    ratio = section.lora_plus_ratio or 1.0
    return [
        {
            "params": parameters,
            "weight_decay": section.weight_decay if decays else 0.0,
            "lr": learning_rate * (ratio if is_b else 1.0),
        }
        for (decays, is_b), parameters in sorted(groups.items(), reverse=True)
    ]
