"""Quantizes a merged model layer by layer: one decoder layer's weights are in memory at a time.

Calibration rows run through the model once. Each layer sees the outputs of the quantized layers before it, and within
a layer each matrix sees those of the quantized matrices before it, so that later ones make up for earlier ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune import progress
from edgetune.errors import InputError
from edgetune.export.quantize.gptq import Factor, factor, gptq
from edgetune.export.quantize.grid import Quantized
from edgetune.export.quantize.plan import EMBEDDING, HEAD, Plan, parts_of
from edgetune.export.quantize.rtn import least_error, min_max
from edgetune.export.quantize.weights import Weights, empty, skeleton

if TYPE_CHECKING:
    import torch

Keep = Callable[[str, Quantized], None]

_FEWEST = 1_000  # tokens under which a Hessian says too little


def quantize_model(
    folder: Path,
    plan: Plan,
    rows: Sequence[Sequence[int]],
    keep: Keep,
    *,
    layer_done: Callable[[], None] = lambda: None,
    trust_remote_code: bool = False,
) -> None:
    """Quantize the embedding, every matrix of every decoder layer, and the head.

    Args:
        folder: merged transformers folder.
        plan: the grids and the method.
        rows: calibration rows, token ids; unused unless the method is `gptq`.
        keep: takes each matrix, by its full name, as soon as it is done. Tied embeddings come once, as `lm_head`.
        layer_done: called after the embedding and after each layer: what was kept can be written.

    Raises:
        InputError: the model has no decoder layers that are found, weights are missing or not finite, a block size does
            not divide a matrix, or there are too few rows to calibrate on.
    """
    import torch

    calibrated = plan.method == "gptq"
    if calibrated and sum(map(len, rows)) < _FEWEST:
        raise InputError(
            f"{sum(map(len, rows))} tokens are too few to calibrate on", fix=f"give rows of {_FEWEST:,} tokens or more"
        )
    model = skeleton(folder, trust_remote_code=trust_remote_code)
    layers, prefix = decoder_layers(model)
    tied = bool(model.config.get_text_config().tie_word_embeddings)
    with torch.inference_mode(), Weights(folder) as weights, progress.task("quantize", len(layers) + 1) as bar:
        states = _embed(model, layers, weights, plan, rows if calibrated else (), keep, tied)
        layer_done()
        bar.advance(1)
        for number, layer in enumerate(layers):
            weights.fill(layer, f"{prefix}.{number}")
            _quantize_layer(layer, f"{prefix}.{number}", plan, states, number, keep, model.config)
            empty(layer)
            layer_done()
            bar.advance(1)
        if not tied:
            _head(model, weights, plan, states, keep)
            layer_done()


def decoder_layers(model: Any) -> tuple[Any, str]:
    """The list of decoder layers of a transformers model, and its name. Raises InputError when there is none."""
    for name, module in model.base_model.named_children():
        if name in ("layers", "h") and len(module):
            return module, f"{model.base_model_prefix}.{name}"
    raise InputError(f"{type(model).__name__} has no decoder layers that are known", fix="choose another model")


class _States:
    """What flows through the model: for each row its hidden states, and what each layer gets beside them."""

    def __init__(self) -> None:
        self.hidden: list[torch.Tensor] = []
        self.extra: list[list[dict[str, Any]]] = []  # by row, then by layer; the same tensors, not copies

    def run(self, layer: Any, number: int) -> None:
        """Send every row through a layer."""
        for i, hidden in enumerate(self.hidden):
            out = layer(hidden, **self.extra[i][number])
            self.hidden[i] = out[0] if isinstance(out, tuple) else out


def _embed(
    model: Any, layers: Any, weights: Weights, plan: Plan, rows: Sequence[Sequence[int]], keep: Keep, tied: bool
) -> _States:
    """Quantize the embedding, and run the rows up to the first layer."""
    import torch

    base, embedding = model.base_model, model.get_input_embeddings()
    name = HEAD if tied else EMBEDDING
    grid = plan.grid(name)
    _check_blocks(name, embedding.weight, grid.block_size)
    weight = weights.get(f"{EMBEDDING}.weight")
    found = min_max(weight, grid) if plan.method == "min_max" else least_error(weight, grid)
    keep(name, found)
    states = _States()
    if not rows:
        return states
    for name, child in base.named_children():
        if child is not layers and child is not embedding:
            weights.fill(child, f"{model.base_model_prefix}.{name}")
    embedding.weight = torch.nn.Parameter(found.dequantize(), requires_grad=False)
    for layer in layers:
        layer.forward = _recorder(states)
    for ids in rows:
        states.extra.append([])
        base(input_ids=torch.tensor([list(ids)]), use_cache=False)
    for layer in layers:
        del layer.forward
    empty(embedding)
    return states


def _recorder(states: _States) -> Callable[..., torch.Tensor]:
    """A layer's forward that only notes what it is given: transformers makes masks and positions before the layers."""

    def forward(hidden: torch.Tensor, **extra: Any) -> torch.Tensor:
        if not states.extra[-1]:
            states.hidden.append(hidden)
        states.extra[-1].append(extra)
        return hidden

    return forward


def _quantize_layer(layer: Any, name: str, plan: Plan, states: _States, number: int, keep: Keep, config: Any) -> None:
    import torch

    linears = {path: module for path, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}
    groups = _groups(layer, linears, states, number) if states.hidden else [list(linears)]
    for group in groups:
        hessian = _hessian(layer, linears[group[0]], states, number) if states.hidden else None
        factors: dict[int, Factor] = {}
        for path in group:
            module = linears[path]
            parts = []
            for part, weight in parts_of(f"{name}.{path}", module.weight, config):
                grid = plan.grid(part)
                _check_blocks(part, weight, grid.block_size)
                if hessian is None:
                    found = min_max(weight, grid) if plan.method == "min_max" else least_error(weight, grid)
                else:
                    if grid.block_size not in factors:
                        factors[grid.block_size] = factor(hessian, grid.block_size)
                    found = gptq(weight, factors[grid.block_size], grid)
                keep(part, found)
                if hessian is not None:
                    parts.append(found.dequantize())
            if parts:
                module.weight = torch.nn.Parameter(torch.cat(parts), requires_grad=False)
    states.run(layer, number)


class _Stop(Exception):
    """Ends a layer's forward once the inputs that are wanted have been seen."""


def _groups(layer: Any, linears: dict[str, Any], states: _States, number: int) -> list[list[str]]:
    """Names of linear layers in the order in which they run; those that read the very same tensor are together."""
    groups: list[list[str]] = []
    seen: list[torch.Tensor] = []

    def note(path: str) -> Callable[..., None]:
        def hook(_: Any, args: tuple[Any, ...]) -> None:
            if seen and seen[-1] is args[0]:
                groups[-1].append(path)
            else:
                groups.append([path])
                seen.append(args[0])

        return hook

    hooks = [module.register_forward_pre_hook(note(path)) for path, module in linears.items()]
    layer(states.hidden[0], **states.extra[0][number])
    for one in hooks:
        one.remove()
    return groups


def _hessian(layer: Any, linear: Any, states: _States, number: int) -> torch.Tensor:
    """X^T X (columns, columns) of a linear layer's inputs over all rows; the layer runs only as far as that."""
    import contextlib

    import torch

    total = torch.zeros(linear.in_features, linear.in_features)

    def hook(_: Any, args: tuple[Any, ...]) -> None:
        inputs = args[0].flatten(0, -2)
        total.addmm_(inputs.T, inputs)
        raise _Stop

    handle = linear.register_forward_pre_hook(hook)
    for hidden, extra in zip(states.hidden, states.extra, strict=True):
        with contextlib.suppress(_Stop):
            layer(hidden, **extra[number])
    handle.remove()
    return total


def _head(model: Any, weights: Weights, plan: Plan, states: _States, keep: Keep) -> None:
    """An untied head: its inputs are the last hidden states, normed."""
    import torch

    grid, weight = plan.grid(HEAD), weights.get(f"{HEAD}.weight")
    _check_blocks(HEAD, weight, grid.block_size)
    if not states.hidden:
        keep(HEAD, min_max(weight, grid) if plan.method == "min_max" else least_error(weight, grid))
        return
    total = torch.zeros(weight.shape[1], weight.shape[1])
    for hidden in states.hidden:
        inputs = model.base_model.norm(hidden).flatten(0, -2)
        total.addmm_(inputs.T, inputs)
    keep(HEAD, gptq(weight, factor(total, grid.block_size), grid))


def _check_blocks(name: str, weight: torch.Tensor, block_size: int) -> None:
    if weight.shape[1] % block_size:
        fits = [size for size in (256, 128, 64, 32, 16) if weight.shape[1] % size == 0]
        raise InputError(
            f"a block of {block_size} does not divide the {weight.shape[1]} columns of {name}",
            fix=f"choose a block of {fits[0]}" if fits else "leave the model in float32",
        )
