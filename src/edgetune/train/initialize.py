"""How an adapter starts, where it does not start at nothing.

PiSSA (arXiv 2404.02948) and OLoRA (arXiv 2406.01775) take the adapter's first values out of the base: W = R + s·B₀·A₀, and
R is what stays frozen. So that the adapter can be used on W itself, it is saved as W + s·(B·A - B₀·A₀): twice the rank.
LoftQ (arXiv 2310.08659, one round) starts at the error of the 4-bit base, EVA (arXiv 2410.07170) at the main directions
of the layers' inputs on the training rows; neither changes the base.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from edgetune.data.batch import Encoded, collate
from edgetune.errors import EdgetuneError
from edgetune.files import read_json, write_json
from edgetune.models import Base, load_model
from edgetune.train import quantize

# Of `train.initialization` in peft's LoraConfig. The singular vectors are found by iteration, as PiSSA's authors do: on
# 2 cores a full decomposition of one 1536 x 576 matrix takes as long as all of a small model's this way.
PEFT_NAMES: dict[str, Any] = {
    "default": True,
    "gaussian": "gaussian",
    "pissa": "pissa_niter_16",
    "olora": "olora",
    "eva": "eva",
    "loftq": True,
}
_EVA_TOKENS, _EVA_PASSES = 512, 400


def remember(model: Any) -> None:
    """Keep A₀ and B₀ of a new adapter that came out of the base: what is saved later needs them."""
    model.first_adapter = {name: weight.detach().clone() for name, weight in _factors(model)}


def taken_from_base(model: Any) -> bool:
    """Whether the adapter's first values were taken out of the base's weights."""
    return hasattr(model, "first_adapter")


def onto_published_base(model: Any, folder: Path) -> None:
    """Change a saved adapter (PiSSA, OLoRA) into one of twice the rank for the base as it was published, in place."""
    import torch
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    weights, first = load_file(path), model.first_adapter
    for name in list(weights):
        if name in first and ".lora_A." in name:
            weights[name] = torch.cat([weights[name], first[name].cpu()], 0)
        elif name in first:
            weights[name] = torch.cat([weights[name], -first[name].cpu()], 1)
    save_file(weights, path, metadata={"format": "pt"})
    config = read_json(folder / "adapter_config.json")
    config["lora_alpha"] *= math.sqrt(2) if config["use_rslora"] else 2  # the scale stays
    config |= {"r": 2 * config["r"], "init_lora_weights": True}
    write_json(folder / "adapter_config.json", config)


def _factors(model: Any) -> Iterator[tuple[str, Any]]:
    """The weights of A and B under the names that peft saves them by."""
    for name, weight in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            yield name.replace(".default.weight", ".weight"), weight


def from_data(model: Any, rows: Sequence[Encoded]) -> None:
    """EVA: start each A at the main directions of what the layer is given for the rows.

    Raises:
        EdgetuneError: the directions do not settle.
    """
    import torch
    from peft import initialize_lora_eva_weights

    passes, decoder = 0, model.get_base_model().get_decoder()

    def forward(_: Any, inputs: dict[str, Any]) -> None:
        nonlocal passes
        passes += 1
        if passes > _EVA_PASSES:
            raise EdgetuneError(
                f"eva: the directions of the layers' inputs did not settle in {_EVA_PASSES} passes",
                where="train.initialization",
                fix="lower train.rank, or use another initialization",
            )
        with torch.no_grad():  # the head is not needed
            decoder(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)

    initialize_lora_eva_weights(
        model,
        _pieces(rows, max(_EVA_TOKENS, 2 * model.peft_config["default"].r)),
        forward_fn=forward,
        gather_distributed_inputs=False,  # each process sees the same rows
        show_progress_bar=False,
    )


def _pieces(rows: Sequence[Encoded], tokens: int) -> list[dict[str, Any]]:
    """Batches of at least `tokens` tokens each, all in all at most 32; short data are repeated."""
    import torch

    found: list[dict[str, Any]] = []
    batch: list[Encoded] = []
    count = at = 0
    while len(found) < 32 and (at < len(rows) or not found):
        row = rows[at % len(rows)]
        batch.append(row)
        count, at = count + len(row.ids), at + 1
        if count >= tokens:
            arrays = {name: torch.from_numpy(array) for name, array in collate(batch, 0).items()}
            found.append({"input_ids": arrays["input_ids"], "attention_mask": arrays["attention_mask"]})
            batch, count = [], 0
    return found


def from_quantization_error(model: Any, base: Base, trust_remote_code: bool) -> None:
    """LoftQ: start each adapter at the best approximation of its rank to what the 4-bit base lacks."""
    import torch

    exact = None
    for name, layer in model.base_model.model.named_modules():
        if not hasattr(layer, "lora_A") or not quantize.layers(layer):
            continue
        if exact is None:
            dtype = layer.get_base_layer().compute_dtype
            exact = dict(load_model(base.path, dtype=dtype, trust_remote_code=trust_remote_code).named_modules())
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        weight = quantize.dequantized(layer.get_base_layer()).float()
        u, sizes, v = torch.linalg.svd(exact[name].weight.to(weight) - weight, full_matrices=False)
        rank = len(a)
        root = (sizes[:rank] / layer.scaling["default"]).sqrt()
        a.data.copy_(root[:, None] * v[:rank])
        b.data.copy_(u[:, :rank] * root)
