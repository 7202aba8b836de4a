"""Whether a model's files are what its configuration says, seen before an export begins.

A loader makes up what is missing and ties what the configuration calls tied, whatever the files hold; both give an artifact
that talks nonsense.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgetune.errors import InputError
from edgetune.export.quantize.plan import EMBEDDING, HEAD
from edgetune.export.quantize.weights import Weights, skeleton

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_FUSED_ON_LOADING = ".experts."  # one tensor for all of them in memory, one each in the files


def check_source(merged: Path, *, trust_remote_code: bool = False) -> None:
    """Compare the weights' names, shapes and ties with config.json, and look at each number.

    Args:
        merged: transformers folder.
        trust_remote_code: run code that it brings.

    Raises:
        InputError: a weight is missing or has another shape, embedding and head are tied in one place only, a number is
            not finite; transformers does not know the architecture.
    """
    model = skeleton(merged, trust_remote_code=trust_remote_code)
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    with Weights(merged) as weights:
        _check_ties(weights, model.config)
        for name, shape in wanted.items():
            if name in weights and weights.shape(name) != shape:
                raise InputError(
                    f"{name} has the shape {weights.shape(name)}, by config.json it has {shape}",
                    where=merged,
                    fix="copy config.json and weights again from one place",
                )
        tied = f"{HEAD}.weight" if model.config.get_text_config().tie_word_embeddings else None
        missing = [name for name in wanted if name not in weights and name != tied and _FUSED_ON_LOADING not in name]
        if missing and len(missing) < len(wanted) / 2:  # else the files have other names, which transformers translates
            raise InputError(
                f"the files lack {len(missing)} weights, first {missing[0]}",
                where=merged,
                fix="copy the model again, whole, or correct config.json",
            )
        for name in weights:
            weights.get(name)


def _check_ties(weights: Weights, config: PretrainedConfig) -> None:
    """Raise InputError where `tie_word_embeddings` contradicts the files."""
    head, embedding = f"{HEAD}.weight", f"{EMBEDDING}.weight"
    if embedding not in weights:
        return
    if not config.get_text_config().tie_word_embeddings:
        if head not in weights:
            raise InputError(
                "config.json says that embedding and head are two matrices (tie_word_embeddings: false), but the files "
                f"hold no {head}",
                where=weights.folder,
                fix="set tie_word_embeddings: true in config.json, or copy the head's file, too",
            )
    elif head in weights and not weights.get(head).equal(weights.get(embedding)):
        raise InputError(
            "config.json says that embedding and head are one matrix (tie_word_embeddings: true), but the files hold two "
            f"that differ: {embedding} and {head}",
            where=weights.folder,
            fix="set tie_word_embeddings: false in config.json; or remove the head from the files, if it is out of date",
        )
