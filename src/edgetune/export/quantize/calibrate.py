"""Quantizes a merged model layer by layer: one decoder layer's weights are in memory at a time.

Calibration rows run through the model twice beside each other. Each layer sees the outputs of the quantized layers before
it, and within a layer each matrix sees those of the quantized matrices before it; and what it would have seen had nothing
been rounded. Later matrices make up for earlier ones: `gptq.correction`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from edgetune import progress
from edgetune.errors import InputError
from edgetune.export.quantize.gptq import Factor, correction, factor, gptq
from edgetune.export.quantize.grid import BLOCK_SIZES, Grid, Quantized
from edgetune.export.quantize.plan import EMBEDDING, HEAD, Method, Plan, parts_of
from edgetune.export.quantize.rtn import least_error, min_max
from edgetune.export.quantize.smooth import Folded, Group, smooth
from edgetune.export.quantize.states import States, embed
from edgetune.export.quantize.weights import Weights, empty, skeleton

if TYPE_CHECKING:
    import torch

    KeepFloat = Callable[[str, torch.Tensor], None]

Keep = Callable[[str, Quantized], None]

FEWEST = 1_000  # tokens under which a Hessian says too little
_TIED = 0.03  # of the Hessian's mean diagonal
_SAMPLE = 1_000  # tokens on which the error of int8 activations is measured


def quantize_model(
    folder: Path,
    plan: Plan,
    rows: Sequence[Sequence[int]],
    keep: Keep,
    *,
    given: Mapping[str, Quantized] = MappingProxyType({}),
    keep_float: KeepFloat = lambda _, __: None,
    layer_done: Callable[[], None] = lambda: None,
    folded: Folded | None = None,
    trust_remote_code: bool = False,
) -> dict[str, float]:
    """Quantize the embedding, every matrix of every decoder layer, and the head.

    Args:
        folder: merged transformers folder.
        plan: the grids and the method.
        rows: calibration rows, token ids; unused where the plan calibrates nothing (`Plan.calibrated`).
        keep: takes each matrix, by its full name, as soon as it is done. Tied embeddings come once, as `lm_head`.
        given: matrices that are on their grids already, by full name; a tied embedding as `lm_head`.
        keep_float: takes each other weight that is not the merged model's any more, float32: norms that were smoothed.
        layer_done: called after the embedding and after each layer: what was kept can be written.
        folded: takes what smoothing divided by.

    Returns:
        The matrices that the plan wants computed with int8 activations and that were given `Plan.spare` instead, and the
        error of their outputs that it would have brought (relative, squared).

    Raises:
        InputError: the model has no decoder layers that are found, weights are missing or not finite, a block size does
            not divide a matrix, or there are too few rows to calibrate on.
    """
    import torch

    if plan.calibrated:
        require_tokens(sum(map(len, rows)))
    model = skeleton(folder, trust_remote_code=trust_remote_code)
    layers, prefix = decoder_layers(model)
    tied = bool(model.config.get_text_config().tie_word_embeddings)
    spared: dict[str, float] = {}
    with torch.inference_mode(), Weights(folder) as weights, progress.task("quantize", len(layers) + 1) as bar:
        used = rows if plan.calibrated else ()
        found, states = _embedding(model, (layers, prefix), weights, plan, used, given.get(HEAD if tied else EMBEDDING))
        keep(HEAD if tied else EMBEDDING, found)
        layer_done()
        bar.advance(1)
        for number, layer in enumerate(layers):
            weights.fill(layer, f"{prefix}.{number}")
            job = Layer(layer, f"{prefix}.{number}", number, plan, states, model.config, folded, given)
            spared |= job.quantize(keep, keep_float)
            empty(layer)
            layer_done()
            bar.advance(1)
        if not tied:
            head = given.get(HEAD)
            keep(HEAD, head or _head(model, weights.get(f"{HEAD}.weight"), plan, states, tied))
        layer_done()
    return spared


def require_tokens(tokens: int, where: str = "data.train") -> None:
    """Raise InputError where calibration rows of so many tokens are too few; `where` is their place."""
    if tokens < FEWEST:
        raise InputError(
            f"{tokens} tokens are too few to calibrate on",
            where=where,
            fix=f"give rows of {FEWEST:,} tokens or more, or choose a target that needs none, such as cpu-int8",
        )


def decoder_layers(model: Any) -> tuple[Any, str]:
    """The list of decoder layers of a transformers model, and its name. Raises InputError when there is none."""
    layers = getattr(model.base_model, "layers", None)
    if model.base_model_prefix == "model" and layers and hasattr(model.base_model, "embed_tokens"):
        return layers, "model.layers"
    raise InputError(
        f"cannot export this model: how {type(model).__name__} is built is not known",
        where="export",
        fix="choose a model of the Llama, Qwen, Phi, Gemma or a like family; or the target cpu-fp32, if the builder knows it",
    )


class Layer:
    """One decoder layer, its weights in memory."""

    def __init__(
        self,
        layer: Any,
        name: str,
        number: int,
        plan: Plan,
        states: States,
        config: Any,
        folded: Folded | None = None,
        given: Mapping[str, Quantized] = MappingProxyType({}),
    ) -> None:
        import torch

        self._begun = given
        self._layer, self._name, self._number, self._states, self._config = layer, name, number, states, config
        self._plan, self._folded = plan, folded
        self._given: dict[str, Grid] = {}  # in place of the plan's
        self._linears = {path: found for path, found in layer.named_modules() if isinstance(found, torch.nn.Linear)}

    def quantize(self, keep: Keep, keep_float: KeepFloat) -> dict[str, float]:
        """Quantize every matrix, and send the rows on. Returns what was spared from int8 activations."""
        spared: dict[str, float] = {}
        groups = self.groups() if self._states.hidden else [Group([path], None) for path in self._linears]
        if self._states.hidden:
            for group in groups:
                spared |= self._ease(group, keep_float)
        exact = self._exact(groups)
        for group in groups:
            self._quantize(group, keep, exact.pop(group.paths[0], []))
        self._states.run(self._layer, self._number)
        return spared

    def parts(self, path: str) -> list[tuple[str, torch.Tensor]]:
        """A linear layer's weight as the parts that the graph computes, by their full names."""
        return parts_of(f"{self._name}.{path}", self._linears[path].weight, self._config)

    def _grid(self, part: str, columns: int) -> Grid:
        return fitted(part, self._given.get(part) or self._plan.grid(part), columns)

    def _exact(self, groups: Sequence[Group]) -> dict[str, list[torch.Tensor]]:
        """What each group's inputs would be had nothing been rounded, by its first linear layer and by row, as float16.

        The layer still has its float weights; the exact states go on through it.
        """
        import torch

        if not self._states.exact:
            return {}
        found: dict[str, list[torch.Tensor]] = {group.paths[0]: [] for group in groups}

        def note(path: str) -> Callable[..., None]:
            return lambda _, args: found[path].append(args[0].flatten(0, -2).to(torch.float16))

        hooks = [self._linears[path].register_forward_pre_hook(note(path)) for path in found]
        self._states.exact = self._states.through(self._layer, self._number, self._states.exact)
        for one in hooks:
            one.remove()
        return found

    def _quantize(self, group: Group, keep: Keep, exact: Sequence[torch.Tensor]) -> None:
        import torch

        parts = {path: self.parts(path) for path in group.paths}
        hessian, makes_up = None, None
        if exact and any(part not in self._begun for found in parts.values() for part, _ in found):
            hessian, apart = self._hessian(group.paths[0], exact)
            makes_up = correction(hessian, apart)
        factors: dict[int, Factor] = {}
        for path, found in parts.items():
            rounded = []
            for part, weight in found:
                if part in self._begun:
                    result = self._begun[part]
                else:
                    result = self._chosen(part, weight, hessian, makes_up, factors)
                keep(part, result)
                if self._states.hidden:
                    rounded.append(result.dequantize())
            if rounded:
                self._linears[path].weight = torch.nn.Parameter(torch.cat(rounded), requires_grad=False)

    def _chosen(
        self,
        part: str,
        weight: torch.Tensor,
        hessian: torch.Tensor | None,
        makes_up: torch.Tensor | None,
        factors: dict[int, Factor],
    ) -> Quantized:
        """A matrix on its grid. `factors` keeps the Hessian's, by block size."""
        import torch

        grid = self._grid(part, weight.shape[1])
        size = grid.block(weight.shape[1])
        wanted = weight if makes_up is None else torch.addmm(weight, weight, makes_up)
        method = self._plan.method_of(part)
        if hessian is None or grid.bits == 8 or method != "gptq":
            return _rounded(wanted, grid, method)
        if size not in factors:
            factors[size] = factor(hessian, size)
        return gptq(wanted, factors[size], grid).as_stored()

    def _ease(self, group: Group, keep_float: KeepFloat) -> dict[str, float]:
        """Smooth the inputs of a group that is computed with int8 activations; leave it to another kernel if that fails."""
        names = [part for path in group.paths for part, _ in self.parts(path)]
        wanted = [name for name in names if self._plan.grid(name).activations == "int8"]
        if not wanted:
            return {}
        self._look(group)
        error, scales = smooth(self._layer, group)
        group.inputs = []
        if scales is not None and group.maker is not None:
            if self._folded is not None:
                self._folded.columns |= dict.fromkeys(names, scales)
                if group.maker in self._linears:
                    self._folded.rows[self.parts(group.maker)[-1][0]] = scales
            maker = self._layer.get_submodule(group.maker)
            for last, tensor in maker.named_parameters(recurse=False):
                if last == "bias" or tensor.dim() == 1:
                    keep_float(f"{self._name}.{group.maker}.{last}", tensor.clone())
        if error <= self._plan.most_error:
            return {}
        for name in wanted:
            self._given[name] = self._plan.spare(self._linears[group.paths[0]].in_features)
        return dict.fromkeys(wanted, error)

    def _run(self, rows: int | None = None) -> None:
        """Send rows through the layer for what hooks see; it runs only as far as they let it."""
        import contextlib

        for hidden, extra in list(zip(self._states.hidden, self._states.extra, strict=True))[:rows]:
            with contextlib.suppress(_Stop):
                self._layer(hidden, **extra[self._number])

    def groups(self) -> list[Group]:
        """Linear layers in the order in which they run; those that read the very same tensor are together."""
        groups: list[Group] = []
        seen: list[torch.Tensor] = []
        made: dict[int, str] = {}  # tensors are alive in `seen` or in the layer's own frames while ids are compared

        def note(path: str) -> Callable[..., None]:
            def hook(_: Any, args: tuple[Any, ...]) -> None:
                if seen and seen[-1] is args[0]:
                    groups[-1].paths.append(path)
                    return
                seen.append(args[0])
                groups.append(Group([path], made.get(id(args[0])) or self._channels_of(path)))

            return hook

        def norm(path: str) -> Callable[..., None]:
            def hook(_: Any, __: Any, out: torch.Tensor) -> None:
                made[id(out)] = path

            return hook

        hooks = [module.register_forward_pre_hook(note(path)) for path, module in self._linears.items()]
        for path, module in self._layer.named_modules():
            if getattr(getattr(module, "weight", None), "ndim", 0) == 1:
                hooks.append(module.register_forward_hook(norm(path)))
        self._run(1)
        for one in hooks:
            one.remove()
        return groups

    def _channels_of(self, path: str) -> str | None:
        """`up_proj` makes the channels of `down_proj`: the gate is only multiplied with them."""
        owner, _, last = path.rpartition(".")
        names = [name for name in (f"{owner}.up_proj", f"{owner}.gate_up_proj") if name in self._linears]
        gated = f"{owner}.gate_proj" in self._linears or f"{owner}.gate_up_proj" in self._linears
        return names[0] if last == "down_proj" and names and gated else None

    def _look(self, group: Group) -> None:
        """Fill in the peaks of a group's inputs over all rows, and the inputs of the first."""
        import torch

        linear, kept = self._linears[group.paths[0]], 0
        group.peaks = torch.zeros(linear.in_features)

        def hook(_: Any, args: tuple[Any, ...]) -> None:
            nonlocal kept
            inputs = args[0].flatten(0, -2)
            torch.maximum(group.peaks, inputs.abs().amax(0), out=group.peaks)
            if kept < _SAMPLE:
                group.inputs.append(inputs.clone())
                kept += len(inputs)
            raise _Stop

        handle = linear.register_forward_pre_hook(hook)
        self._run()
        handle.remove()

    def _hessian(self, path: str, exact: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """X^T X and (E - X)^T X (columns, columns) of a linear layer's inputs X over all rows, and the exact ones E."""
        import torch

        linear, waiting = self._linears[path], iter(exact)
        total, apart = torch.zeros(2, linear.in_features, linear.in_features)

        def hook(_: Any, args: tuple[Any, ...]) -> None:
            _add(total, apart, args[0].flatten(0, -2), next(waiting))
            raise _Stop

        handle = linear.register_forward_pre_hook(hook)
        self._run()
        handle.remove()
        return total, apart


class _Stop(Exception):
    """Ends a layer's forward once the inputs that are wanted have been seen."""


def _rounded(weight: torch.Tensor, grid: Grid, method: Method) -> Quantized:
    found = least_error(weight, grid) if method == "least_error" else min_max(weight, grid)
    return found.as_stored()


def _embedding(
    model: Any,
    decoder: tuple[Any, str],
    weights: Weights,
    plan: Plan,
    rows: Sequence[Sequence[int]],
    given: Quantized | None,
) -> tuple[Quantized, States]:
    """The quantized embedding, unless it is given, and the rows before the first layer. A tied one is the head, too, whose inputs are
    the last hidden states: for these the rows go through the float model first."""
    layers, prefix = decoder
    tied = bool(model.config.get_text_config().tie_word_embeddings)
    exact = weights.get(f"{EMBEDDING}.weight")
    searched = bool(rows) and plan.searched
    last = embed(model, layers, weights, exact, rows if searched else ())
    first = list(last.hidden)
    if given is not None:
        found = given
    elif tied:
        if searched and plan.method_of(HEAD) == "gptq" and fitted(HEAD, plan.grid(HEAD), exact.shape[1]).bits == 4:
            for number, layer in enumerate(layers):
                weights.fill(layer, f"{prefix}.{number}")
                last.run(layer, number)
                empty(layer)
        found = _head(model, exact, plan, last, tied)
    else:
        grid = fitted(EMBEDDING, plan.grid(EMBEDDING), exact.shape[1])
        found = _rounded(exact, grid, plan.method_of(EMBEDDING))
    del last
    states = embed(model, layers, weights, found.dequantize() if rows else exact, rows)
    states.exact = first
    return found, states


def _head(model: Any, weight: torch.Tensor, plan: Plan, states: States, tied: bool) -> Quantized:
    """The head: its inputs are the last hidden states, normed. A tied one is the embedding, too."""
    import torch

    grid, method = fitted(HEAD, plan.grid(HEAD), weight.shape[1]), plan.method_of(HEAD)
    nearest = grid.bits == 8 or method != "gptq"
    if not states.hidden or not plan.searched or (nearest and not states.exact):
        return _rounded(weight, grid, method)
    hessian, apart = head_sums(model, states, tied)
    if states.exact:
        weight = torch.addmm(weight, weight, correction(hessian, apart))
    if nearest:
        return _rounded(weight, grid, method)
    return gptq(weight, factor(hessian, grid.block_size), grid).as_stored()


def head_sums(model: Any, states: States, tied: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """X^T X and (E - X)^T X (columns, columns) of the head's inputs, from the last layer's outputs and the exact ones; the
    latter is zero where the states have none."""
    import torch

    size, norm = states.hidden[0].shape[-1], model.base_model.norm
    total, apart = torch.zeros(2, size, size)
    for row, hidden in enumerate(states.hidden):
        exact = norm(states.exact[row]).flatten(0, -2) if states.exact else None
        _add(total, apart, norm(hidden).flatten(0, -2), exact)
    if tied:  # a lookup reads single weights: these shall not be bent as far as the products would bear
        total.diagonal().add_(_TIED * total.diagonal().mean())
    return total, apart


def _add(total: torch.Tensor, apart: torch.Tensor, inputs: torch.Tensor, exact: torch.Tensor | None) -> None:
    """Add X^T X and (E - X)^T X of some inputs (tokens, columns) and what they would be had nothing been rounded."""
    total.addmm_(inputs.T, inputs)
    if exact is not None:
        apart.addmm_((exact.float() - inputs).T, inputs)


def fitted(name: str, grid: Grid, columns: int) -> Grid:
    """The grid, with the next smaller block that divides so many columns. Raises InputError when there is none."""
    if grid.activations == "int8" or columns % grid.block_size == 0:
        return grid
    fits = [size for size in BLOCK_SIZES if columns % size == 0 and size < grid.block_size]
    if not fits:
        raise InputError(
            f"no block size divides the {columns} columns of {name}",
            where="export.target",
            fix="choose the target cpu-fp32, which leaves it unquantized",
        )
    return replace(grid, block_size=fits[-1])
