"""Calibration rows on their way through a model: what each decoder layer is given, one layer's weights in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from edgetune.export.quantize.weights import Weights, empty

if TYPE_CHECKING:
    import torch


class States:
    """What flows through the model: for each row its hidden states, and what each layer gets beside them."""

    def __init__(self) -> None:
        self.hidden: list[torch.Tensor] = []
        self.exact: list[torch.Tensor] = []  # what they would be had nothing been rounded; empty where nobody asks
        self.extra: list[list[dict[str, Any]]] = []  # by row, then by layer; the same tensors, not copies

    def run(self, layer: Any, number: int) -> None:
        """Send every row through a layer."""
        self.hidden = self.through(layer, number, self.hidden)

    def through(self, layer: Any, number: int, hidden: list[torch.Tensor]) -> list[torch.Tensor]:
        """Outputs of a layer for other hidden states of the same rows, which are used up."""
        for i in range(len(hidden)):
            out = layer(hidden[i], **self.extra[i][number])
            hidden[i] = out[0] if isinstance(out, tuple) else out
        return hidden


def embed(model: Any, layers: Any, weights: Weights, embedding: torch.Tensor, rows: Sequence[Sequence[int]]) -> States:
    """Run rows up to the first layer, with this embedding (tokens, hidden)."""
    import torch

    if not rows:
        return States()
    base, place = model.base_model, model.get_input_embeddings()
    for name, child in base.named_children():
        if child is not layers and child is not place:
            weights.fill(child, f"{model.base_model_prefix}.{name}")
    place.weight = torch.nn.Parameter(embedding, requires_grad=False)
    states = enter(model, layers, rows)
    empty(place)
    return states


def enter(model: Any, layers: Any, rows: Sequence[Sequence[int]]) -> States:
    """Run rows of token ids up to the first layer; all but the layers has its weights."""
    import torch

    states = States()
    for layer in layers:
        layer.forward = _recorder(states)
    for ids in rows:
        states.extra.append([])
        model.base_model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    for layer in layers:
        del layer.forward
    return states


def _recorder(states: States) -> Callable[..., torch.Tensor]:
    """A layer's forward that only notes what it is given: transformers makes masks and positions before the layers."""

    def forward(hidden: torch.Tensor, **extra: Any) -> torch.Tensor:
        if not states.extra[-1]:
            states.hidden.append(hidden)
        states.extra[-1].append(extra)
        return hidden

    return forward
