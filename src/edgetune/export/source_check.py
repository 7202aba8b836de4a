"""Whether a model's files are what its configuration says, seen before a run trains and before an export begins.

A loader makes up what is missing and ties what the configuration calls tied, whatever the files hold; both give an artifact
that talks nonsense.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.errors import InputError
from edgetune.export.quantize.plan import EMBEDDING, HEAD
from edgetune.export.quantize.weights import Weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_LAYER = re.compile(r"(model\.layers\.)(\d+)(\..+)")
_FUSED_ON_LOADING = ".experts."  # one tensor for all of them in memory, one each in the files


def check_source(folder: Path, model: Any, largest: float = math.inf) -> None:
    """Compare the weights' names and shapes with config.json, and look at each number.

    Args:
        folder: transformers folder.
        model: its `skeleton`.
        largest: number that the export can store.

    Raises:
        InputError: a weight is missing or has another shape, there are more layers than config.json says, or a number is
            not finite or too large.
    """
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    with Weights(folder) as weights:
        for name, shape in wanted.items():
            if name in weights and weights.shape(name) != shape:
                raise InputError(
                    f"{name} has the shape {weights.shape(name)}, by config.json it has {shape}",
                    where=folder,
                    fix="copy config.json and weights again from one place",
                )
        tied = f"{HEAD}.weight" if model.config.get_text_config().tie_word_embeddings else None
        missing = [name for name in wanted if name not in weights and name != tied and _FUSED_ON_LOADING not in name]
        if missing and len(missing) < len(wanted) / 2:  # else the files have other names, which transformers translates
            raise InputError(
                f"the files lack {len(missing)} weights, first {missing[0]}",
                where=folder,
                fix="copy the model again, whole, or correct config.json",
            )
        _require_all_layers(folder, model, list(weights), wanted)
        for name in weights:
            tensor = weights.get(name)
            if (
                name in wanted
                and largest < math.inf
                and tensor.numel()
                and (most := float(tensor.abs().max())) > largest
            ):
                raise InputError(
                    f"{name} holds {most:g}, and the target's weights go up to {largest:g}",
                    where=folder,
                    fix="choose a target of another precision: one with bfloat16, int8, int4 or float32",
                )


def _require_all_layers(folder: Path, model: Any, names: list[str], wanted: Mapping[str, Any]) -> None:
    """Raise InputError where the files hold layers like the model's behind the last one that config.json knows."""
    config = model.config.get_text_config()
    count = getattr(config, "num_hidden_layers", math.inf)
    own = int(getattr(config, "num_nextn_predict_layers", None) or 0)  # they predict further tokens, and are left out
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    for name in names:
        if any(pattern.search(name) for pattern in ignored):
            continue
        found = _LAYER.match(name)
        if found and int(found[2]) >= count + own and f"{found[1]}0{found[3]}" in wanted:
            raise InputError(
                f"config.json says {count} layers (num_hidden_layers), the files hold more: {name}",
                where=folder,
                fix="copy config.json and weights again from one place",
            )


def check_ties(folder: Path, config: PretrainedConfig) -> None:
    """Raise InputError where `tie_word_embeddings` contradicts the files."""
    head, embedding = f"{HEAD}.weight", f"{EMBEDDING}.weight"
    with Weights(folder) as weights:
        if embedding not in weights:
            return
        if not config.get_text_config().tie_word_embeddings:
            if head not in weights:
                raise InputError(
                    "config.json says that embedding and head are two matrices (tie_word_embeddings: false), but the files "
                    f"hold no {head}",
                    where=folder,
                    fix="set tie_word_embeddings: true in config.json, or copy the head's file, too",
                )
        elif head in weights and not weights.get(head).equal(weights.get(embedding)):
            raise InputError(
                "config.json says that embedding and head are one matrix (tie_word_embeddings: true), but the files hold two "
                f"that differ: {embedding} and {head}",
                where=folder,
                fix="set tie_word_embeddings: false in config.json; or remove the head from the files, if it is out of date",
            )
