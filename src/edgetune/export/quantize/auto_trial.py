"""One decoder layer with each of its groups on each candidate, for `auto_sensitivity`.

A group is the matrices that read the same tensor: they are decided together, so that the graph can join them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgetune.export.quantize.calibrate import Layer, fitted
from edgetune.export.quantize.gptq import Factor, factor, gptq
from edgetune.export.quantize.grid import Grid, Quantized
from edgetune.export.quantize.plan import Plan
from edgetune.export.quantize.rtn import min_max
from edgetune.export.quantize.smooth import Group, divide, round_inputs, smooth
from edgetune.export.quantize.states import States

if TYPE_CHECKING:
    import torch

FLOAT = Plan(Grid(8, 32), method="min_max")  # for what is asked of a plan where nothing is quantized
_SAMPLE = 1_000  # tokens on which channel scales are chosen


@dataclass
class Parts:
    """A group.

    Attributes:
        name: as people read it: `model.layers.3 gate_proj+up_proj`.
        shapes: (rows, columns) of its matrices, by their full names.
        hessian: X^T X of its inputs.
    """

    name: str
    shapes: dict[str, tuple[int, int]]
    group: Group
    hessian: torch.Tensor


@dataclass
class Change:
    """A group on a candidate.

    Attributes:
        weights: the parts of each linear layer, by its path.
        scales: what the inputs' channels are divided by, or None.
    """

    group: Group
    weights: dict[str, list[Quantized]]
    scales: torch.Tensor | None


class Trial:
    """All candidates for all groups of one decoder layer.

    Args:
        layer: its float weights are in memory.
        name: its full name.
        number: its number.
        candidates: grids by name.
        calibration: states of the calibration rows before the layer; after it, once this is made.
        states: of the held-out rows, before the layer.
        config: the transformers configuration.
    """

    def __init__(
        self,
        layer: Any,
        name: str,
        number: int,
        candidates: Mapping[str, Grid],
        calibration: States,
        states: States,
        config: Any,
    ) -> None:
        self._layer, self._number, self._candidates = layer, number, candidates
        self._states = states
        self._job = Layer(layer, name, number, FLOAT, calibration, config)
        self._kept = dict(layer.named_parameters())
        self.groups = [self._parts(name, group) for group in self._job.groups()]
        self._observe(calibration)

    def _parts(self, layer: str, group: Group) -> Parts:
        import torch

        parts = [(name, weight) for path in group.paths for name, weight in self._job.parts(path)]
        last = "+".join(name.rpartition(".")[2] for name, _ in parts)
        columns = parts[0][1].shape[1]
        group.peaks = torch.zeros(columns)
        shapes = {part: (weight.shape[0], columns) for part, weight in parts}
        return Parts(f"{layer} {last}", shapes, group, torch.zeros(columns, columns))

    def _observe(self, calibration: States) -> None:
        """Run the calibration rows through the layer once: each group's X^T X, peaks and a sample of its inputs."""
        import torch

        hooks = []
        for parts in self.groups:

            def hook(_: Any, args: tuple[Any, ...], parts: Parts = parts) -> None:
                inputs, group = args[0].flatten(0, -2), parts.group
                parts.hessian.addmm_(inputs.T, inputs)
                torch.maximum(group.peaks, inputs.abs().amax(0), out=group.peaks)
                if sum(map(len, group.inputs)) < _SAMPLE:
                    group.inputs.append(inputs.clone())

            hooks.append(self._layer.get_submodule(parts.group.paths[0]).register_forward_pre_hook(hook))
        calibration.run(self._layer, self._number)
        for one in hooks:
            one.remove()

    def changes(self, parts: Parts) -> dict[str, Change]:
        """What each candidate changes, by its name."""
        found: dict[str, Change] = {}
        group = parts.group
        factors: dict[int, Factor] = {}
        for label, grid in self._candidates.items():
            scales = None
            if grid.activations == "int8":
                self._own([*group.paths, *([group.maker] if group.maker else [])])
                _, scales = smooth(self._layer, group)
            weights = {}
            for path in group.paths:
                weights[path] = [
                    self._quantized(parts, part, one, grid, factors) for part, one in self._job.parts(path)
                ]
            found[label] = Change(group, weights, scales)
            self._restore()
        return found

    def _quantized(
        self, parts: Parts, name: str, weight: torch.Tensor, grid: Grid, factors: dict[int, Factor]
    ) -> Quantized:
        grid = fitted(name, grid, weight.shape[1])
        if grid.bits == 8:
            return min_max(weight, grid).as_stored()
        if grid.block_size not in factors:
            factors[grid.block_size] = factor(parts.hessian, grid.block_size)
        return gptq(weight, factors[grid.block_size], grid).as_stored()

    def run(self, changes: Sequence[Change], hidden: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The layer's outputs with these changes, by row."""
        import torch

        hooks = []
        for change in changes:
            for path, parts in change.weights.items():
                weight = torch.cat([one.dequantize() for one in parts])
                self._layer.get_submodule(path).weight = torch.nn.Parameter(weight, requires_grad=False)
                grid = parts[0].grid

                def hook(_: Any, args: tuple[Any, ...], grid: Grid = grid) -> tuple[Any, ...]:
                    return (rounded_inputs(args[0], grid), *args[1:])

                hooks.append(self._layer.get_submodule(path).register_forward_pre_hook(hook))
            if change.scales is not None and change.group.maker is not None:
                self._own([change.group.maker])
                divide(self._layer.get_submodule(change.group.maker), change.scales)
        found = []
        for row, one in enumerate(hidden):
            out = self._layer(one, **self._states.extra[row][self._number])
            found.append(out[0] if isinstance(out, tuple) else out)
        for one in hooks:
            one.remove()
        self._restore()
        return found

    def _own(self, paths: Sequence[str]) -> None:
        """Give modules copies of their weights, to be changed in place."""
        import torch

        for path in paths:
            module = self._layer.get_submodule(path)
            for name, one in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(one.clone(), requires_grad=False))

    def _restore(self) -> None:
        for name, value in self._kept.items():
            owner, _, last = name.rpartition(".")
            setattr(self._layer.get_submodule(owner), last, value)


def rounded_inputs(inputs: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Inputs (1, tokens, channels) as the grid's kernel rounds them where a row is read as a whole, as the gate reads it.

    `MatMulNBits`, at the builder's accuracy level 4, has a scale for each block of each token and symmetric codes.
    """
    if grid.activations == "int8":
        return round_inputs(inputs)
    blocks = inputs.unflatten(-1, (-1, grid.block_size))
    scale = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return (blocks / scale).round_().mul_(scale).flatten(-2)
