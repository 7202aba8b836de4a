"""One decoder layer with each of its groups on each candidate, for `auto_sensitivity`.

A group is the matrices that read the same tensor: they are decided together, so that the graph can join them. 4-bit codes
are found in two ways, by GPTQ and by scales with the least error of the weights. Both have the same bytes and the same
kernel, so only the better one counts, and it is told by what the layer then gives for the held-out rows: their divergence
would cost a run through all layers that follow for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgetune.export.quantize.calibrate import Layer, fitted
from edgetune.export.quantize.gptq import Factor, factor, gptq
from edgetune.export.quantize.grid import Grid, Quantized
from edgetune.export.quantize.plan import Method, Plan
from edgetune.export.quantize.rtn import least_error, min_max
from edgetune.export.quantize.smooth import Group, divide, round_inputs, smooth
from edgetune.export.quantize.states import States

if TYPE_CHECKING:
    import torch

METHODS: tuple[Method, ...] = ("gptq", "least_error")  # of 4-bit codes
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
        method: of 4-bit codes, or None.
    """

    group: Group
    weights: dict[str, list[Quantized]]
    scales: torch.Tensor | None = None
    method: Method | None = None


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
        self._wanted: list[torch.Tensor] = []  # of the float layer, for the held-out rows

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

    def plain(self, parts: Parts, grid: Grid) -> Change:
        """A group rounded to nearest, with 32-bit scales."""
        weights = {
            path: [min_max(one, fitted(name, grid, one.shape[1])) for name, one in self._job.parts(path)]
            for path in parts.group.paths
        }
        return Change(parts.group, weights)

    def better(self, ways: Sequence[Change]) -> tuple[Change, list[torch.Tensor]]:
        """Of several changes the one whose outputs for the held-out rows are nearer to the float layer's, and these."""
        found = [(way, self.run([way], self._states.hidden)) for way in ways]
        if len(found) == 1:
            return found[0]
        self._wanted = self._wanted or self.run([], self._states.hidden)
        return min(found, key=lambda one: self._apart(one[1]))

    def _apart(self, outputs: Sequence[torch.Tensor]) -> float:
        """Squared error of the layer's outputs, relative, mean over tokens: a few tokens have far larger outputs."""
        pairs = zip(outputs, self._wanted, strict=True)
        apart = [
            ((out - want).square().sum(-1) / want.square().sum(-1).clamp(min=1e-20)).flatten() for out, want in pairs
        ]
        return float(sum(one.sum() for one in apart)) / sum(map(len, apart))

    def changes(self, parts: Parts) -> dict[str, list[Change]]:
        """What each candidate changes, by its name; of 4 bits in each way."""
        found: dict[str, list[Change]] = {}
        group = parts.group
        factors: dict[int, Factor] = {}
        for label, grid in self._candidates.items():
            scales = None
            if grid.activations == "int8":
                self._own([*group.paths, *([group.maker] if group.maker else [])])
                _, scales = smooth(self._layer, group)
            found[label] = []
            for method in ways_of(grid):
                weights = {
                    path: [
                        self._quantized(parts, part, one, grid, method, factors) for part, one in self._job.parts(path)
                    ]
                    for path in group.paths
                }
                found[label].append(Change(group, weights, scales, method))
            self._restore()
        return found

    def _quantized(
        self,
        parts: Parts,
        name: str,
        weight: torch.Tensor,
        grid: Grid,
        method: Method | None,
        factors: dict[int, Factor],
    ) -> Quantized:
        grid = fitted(name, grid, weight.shape[1])
        if method != "gptq":
            found = least_error(weight, grid) if method else min_max(weight, grid)
            return found.as_stored()
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


def ways_of(grid: Grid) -> tuple[Method | None, ...]:
    """The methods that are tried on a grid: those of 4-bit codes, or None."""
    return METHODS if grid.bits == 4 else (None,)


def rounded_inputs(inputs: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Inputs (1, tokens, channels) as the grid's kernel rounds them where a row is read as a whole, as the gate reads it.

    `MatMulNBits`, at the builder's accuracy level 4, has a scale for each block of each token and symmetric codes.
    """
    if grid.activations == "int8":
        return round_inputs(inputs)
    blocks = inputs.unflatten(-1, (-1, grid.block_size))
    scale = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return (blocks / scale).round_().mul_(scale).flatten(-2)
