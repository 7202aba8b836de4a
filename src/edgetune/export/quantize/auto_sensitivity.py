"""How much each unit of a model suffers from each candidate: the KL divergence that it alone brings, on held-out rows.

The rows run through the float model once. In each decoder layer every group of matrices that read the same tensor is
quantized with every candidate in turn, the layer's outputs with it are sent through the float layers that follow, and the
next-token distributions are compared. Weights are read layer by layer, as they are needed; what a layer came to is kept
in a file, so that an interrupted measurement goes on where it stopped.

Divergences of single groups add up only while they are small. So one more run goes along for each candidate, in which all
groups up to here are quantized with it: what it comes to in the end says how a candidate's divergences are to be scaled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune import progress
from edgetune.data.batch import Encoded
from edgetune.export.quantize.calibrate import Layer, decoder_layers, embed, enter, fitted, head_hessian
from edgetune.export.quantize.gptq import Factor, factor, gptq
from edgetune.export.quantize.grid import Grid, Quantized
from edgetune.export.quantize.plan import EMBEDDING, HEAD, Plan
from edgetune.export.quantize.rtn import min_max
from edgetune.export.quantize.smooth import Group, divide, round_inputs, smooth
from edgetune.export.quantize.weights import Weights, empty, skeleton
from edgetune.files import read_json, write_json

if TYPE_CHECKING:
    import torch

_CHUNK = 64  # tokens of a prompt that the runtime reads at once
_SAMPLE = 1_000  # tokens on which channel scales are chosen
_FLOAT = Plan(Grid(8, 32), method="min_max")


@dataclass
class Measured:
    """One group of matrices.

    Attributes:
        name: as people read it: `model.layers.3 gate_proj+up_proj`.
        shapes: (rows, columns) of its matrices, by their full names.
        kld: mean KL divergence with a candidate, by the candidate's name.
    """

    name: str
    shapes: dict[str, tuple[int, int]]
    kld: dict[str, float] = field(default_factory=dict)


@dataclass
class Sensitivity:
    """What was measured.

    Attributes:
        units: all groups, those of the layers first.
        together: mean KL divergence with all groups of the layers on a candidate, by its name.
    """

    units: list[Measured]
    together: dict[str, float]


def measure(
    merged: Path,
    candidates: Mapping[str, Grid],
    heads: Sequence[str],
    rows: Sequence[Sequence[int]],
    held_out: Sequence[Encoded],
    kept: Path,
    *,
    trust_remote_code: bool = False,
) -> Sensitivity:
    """Measure every group with every candidate.

    Args:
        merged: transformers folder.
        candidates: grids by name.
        heads: the names of those that the embedding and the head may have.
        rows: token ids to calibrate on.
        held_out: other rows, of which positions that carry loss are compared.
        kept: existing folder of what was measured; it goes on from what it holds.
    """
    import torch

    model = skeleton(merged, trust_remote_code=trust_remote_code)
    layers, prefix = decoder_layers(model)
    with torch.inference_mode(), Weights(merged) as weights:
        walk = _Walk(model, layers, prefix, weights, candidates, held_out, kept)
        with progress.task("measure what each layer bears", len(layers) + 2) as bar:
            walk.start(rows)
            for number in range(len(layers)):
                walk.layer(number)
                bar.advance(1)
            walk.ends(heads)
    return Sensitivity(walk.units, walk.together)


class _Walk:
    def __init__(
        self,
        model: Any,
        layers: Any,
        prefix: str,
        weights: Weights,
        candidates: Mapping[str, Grid],
        held_out: Sequence[Encoded],
        kept: Path,
    ) -> None:
        self._model, self._layers, self._prefix, self._weights = model, layers, prefix, weights
        self._candidates, self._kept = candidates, kept
        self._ids = [list(row.ids) for row in held_out]
        self._places = [[at - 1 for at in range(1, len(row.ids)) if row.learned[at]] for row in held_out]
        self._tied = bool(model.config.get_text_config().tie_word_embeddings)
        self._wanted: list[torch.Tensor] = []  # log-probabilities by row (places, vocabulary)
        self._together: dict[str, list[torch.Tensor]] = {}  # hidden states by row, all groups so far on a candidate
        self.units: list[Measured] = []
        self.together: dict[str, float] = {}

    def start(self, rows: Sequence[Sequence[int]]) -> None:
        """Read what is not a layer, run all rows up to the first one, and the held-out ones to the end."""
        self._calibration = embed(self._model, self._layers, self._weights, _FLOAT, rows, None)
        self._fill_ends()
        self._states = enter(self._model, self._layers, self._ids)
        hidden = [one[None] for one in self._states.hidden]
        for row, out in enumerate(self._through(hidden, 0)):
            self._wanted.append(self._scores(row, out[0]))
        self._together = {name: list(self._states.hidden) for name in self._candidates}

    def layer(self, number: int) -> None:
        """Measure a layer's groups, or take what was measured; then run the float states through it."""
        file, states = self._kept / f"layer-{number:04d}.json", self._kept / f"layer-{number:04d}.safetensors"
        self._weights.fill(self._layers[number], f"{self._prefix}.{number}")
        if file.is_file():
            self._take(read_json(file), states)
            self._advance(number)
        else:
            found = _Trial(self, number)
            self.units += found.units
            self._keep(file, states, found.units)
        self._states.run(self._layers[number], number)
        empty(self._layers[number])

    def ends(self, heads: Sequence[str]) -> None:
        """Measure the head and the embedding, and all groups of the layers together."""
        file = self._kept / "ends.json"
        if file.is_file():
            found = read_json(file)
            self.units += [_measured(one) for one in found["units"]]
            self.together = found["together"]
            return
        for name, rows in self._together.items():
            klds = [self._kld(row, hidden) for row, hidden in enumerate(rows)]
            self.together[name] = self._mean(klds)
        units = self._ends(heads)
        self.units += units
        write_json(file, {"units": [vars(one) for one in units], "together": self.together})

    def divergences(self, variants: Sequence[Sequence[torch.Tensor]], number: int) -> list[float]:
        """Mean KL divergence of each variant, given its hidden states by row, before a layer."""
        import torch

        hidden = [torch.stack([variant[row] for variant in variants]) for row in range(len(self._ids))]
        klds: list[list[torch.Tensor]] = [[] for _ in variants]
        for row, out in enumerate(self._through(hidden, number)):
            for at, one in enumerate(out):
                klds[at].append(self._kld(row, one))
        return [self._mean(one) for one in klds]

    def _advance(self, number: int) -> None:
        """Run the calibration rows through a float layer."""
        self._calibration.run(self._layers[number], number)

    def _through(self, hidden: list[torch.Tensor], number: int) -> Iterator[torch.Tensor]:
        """Send variants (variants, 1, tokens, channels) of each row through the float layers from one on."""
        for at in range(number, len(self._layers)):
            self._weights.fill(self._layers[at], f"{self._prefix}.{at}")
            for row, one in enumerate(hidden):
                out = self._layers[at](one.flatten(0, 1), **self._states.extra[row][at])
                hidden[row] = (out[0] if isinstance(out, tuple) else out).unflatten(0, one.shape[:2])
            empty(self._layers[at])
        yield from hidden

    def _scores(self, row: int, hidden: torch.Tensor) -> torch.Tensor:
        """Log-probabilities at a row's places, of the model's own norm and head, from the last layer's outputs."""
        import torch

        for layer in self._layers:
            layer.forward = lambda _, **__: hidden
        kept = torch.tensor(self._places[row])
        out = self._model(input_ids=torch.tensor([self._ids[row]]), use_cache=False, logits_to_keep=kept)
        for layer in self._layers:
            del layer.forward
        scores: torch.Tensor = out.logits[0].float().log_softmax(-1)
        return scores

    def _kld(self, row: int, hidden: torch.Tensor) -> torch.Tensor:
        wanted = self._wanted[row]
        return (wanted.exp() * (wanted - self._scores(row, hidden))).sum(-1)

    @staticmethod
    def _mean(klds: Sequence[torch.Tensor]) -> float:
        import torch

        return max(0.0, float(torch.cat(list(klds)).double().mean()))

    def _fill_ends(self) -> None:
        """Give the embedding, the norms and the head their weights."""
        import torch

        model = self._model
        for name, child in model.base_model.named_children():
            if child is not self._layers:
                self._weights.fill(child, f"{model.base_model_prefix}.{name}")
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        if self._tied:
            head.weight = embedding.weight
        else:
            head.weight = torch.nn.Parameter(self._weights.get(f"{HEAD}.weight"), requires_grad=False)

    def _keep(self, file: Path, states: Path, units: list[Measured]) -> None:
        from safetensors.torch import save_file

        tensors = {f"{name}/{row}": one for name, rows in self._together.items() for row, one in enumerate(rows)}
        save_file(tensors, str(states))
        write_json(file, {"units": [vars(one) for one in units]})
        for old in self._kept.glob("*.safetensors"):
            if old != states:
                old.unlink()

    def _take(self, found: Any, states: Path) -> None:
        from safetensors.torch import load_file

        self.units += [_measured(one) for one in found["units"]]
        if states.is_file():  # only those of the last layer that was measured are kept
            tensors = load_file(str(states))
            self._together = {
                name: [tensors[f"{name}/{row}"] for row in range(len(self._ids))] for name in self._candidates
            }

    def _ends(self, heads: Sequence[str]) -> list[Measured]:
        """The head, and the embedding: apart, or as the one matrix that both are."""
        model = self._model
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        names = [HEAD] if self._tied else [HEAD, EMBEDDING]
        units = [Measured(name, {name: tuple(head.weight.shape)}) for name in names]
        hessian = None
        for label in heads:
            for unit in units:
                own = head if unit.name == HEAD else embedding
                grid = fitted(unit.name, self._candidates[label], own.weight.shape[1])
                if grid.bits == 4 and unit.name == HEAD:
                    hessian = head_hessian(model, self._calibration, self._tied) if hessian is None else hessian
                    found = gptq(own.weight, factor(hessian, grid.block_size), grid)
                else:
                    found = min_max(own.weight, grid)
                with self._instead([embedding, head] if self._tied else [own], found.as_stored().dequantize()):
                    states = enter(model, self._layers, self._ids).hidden
                    unit.kld[label] = self.divergences([states], 0)[0]
        return units

    @contextlib.contextmanager
    def _instead(self, modules: Sequence[Any], weight: torch.Tensor) -> Iterator[None]:
        import torch

        own = modules[0].weight
        for module in modules:
            module.weight = torch.nn.Parameter(weight, requires_grad=False)
        yield
        for module in modules:
            module.weight = own


class _Trial:
    """All candidates for all groups of one decoder layer, whose float weights are in memory."""

    def __init__(self, walk: _Walk, number: int) -> None:
        self._walk, self._number, self._layer = walk, number, walk._layers[number]
        self._job = Layer(
            self._layer, f"{walk._prefix}.{number}", number, _FLOAT, walk._calibration, walk._model.config
        )
        self._groups = self._job.groups()
        self._hessians = self._observe()
        self._kept = dict(self._layer.named_parameters())
        self.units: list[Measured] = []
        variants, owners = list[list["torch.Tensor"]](), list[tuple[Measured, str]]()
        choices: dict[str, list[_Change]] = {name: [] for name in walk._candidates}
        for group in self._groups:
            unit = self._unit(group)
            self.units.append(unit)
            for label, changes in self._changes(group).items():
                choices[label].append(changes)
                variants.append(self._run([changes], walk._states.hidden))
                owners.append((unit, label))
            self._hessians.pop(group.paths[0])
            group.inputs = []
        for label, whole in choices.items():
            walk._together[label] = self._run(whole, walk._together[label])
        for (unit, label), kld in zip(owners, walk.divergences(variants, number + 1), strict=True):
            unit.kld[label] = kld

    def _unit(self, group: Group) -> Measured:
        parts = [(name, weight) for path in group.paths for name, weight in self._job.parts(path)]
        last = "+".join(name.rpartition(".")[2] for name, _ in parts)
        name = f"{self._walk._prefix}.{self._number} {last}"
        return Measured(name, {part: (weight.shape[0], weight.shape[1]) for part, weight in parts})

    def _observe(self) -> dict[str, torch.Tensor]:
        """Run the calibration rows through the layer once: X^T X of each group's inputs by its first path, their peaks and
        a sample of them."""
        import torch

        hessians: dict[str, torch.Tensor] = {}
        hooks = []
        for group in self._groups:
            linear = self._layer.get_submodule(group.paths[0])
            total = hessians[group.paths[0]] = torch.zeros(linear.in_features, linear.in_features)
            group.peaks = torch.zeros(linear.in_features)

            def hook(_: Any, args: tuple[Any, ...], group: Group = group, total: torch.Tensor = total) -> None:
                inputs = args[0].flatten(0, -2)
                total.addmm_(inputs.T, inputs)
                torch.maximum(group.peaks, inputs.abs().amax(0), out=group.peaks)
                if sum(map(len, group.inputs)) < _SAMPLE:
                    group.inputs.append(inputs.clone())

            hooks.append(linear.register_forward_pre_hook(hook))
        self._walk._advance(self._number)
        for one in hooks:
            one.remove()
        return hessians

    def _changes(self, group: Group) -> dict[str, _Change]:
        """What each candidate changes."""
        found: dict[str, _Change] = {}
        factors: dict[int, Factor] = {}
        for label, grid in self._walk._candidates.items():
            scales = None
            if grid.activations == "int8":
                self._own([*group.paths, *([group.maker] if group.maker else [])])
                _, scales = smooth(self._layer, group)
            weights = {}
            for path in group.paths:
                weights[path] = [
                    self._quantized(group, part, one, grid, factors) for part, one in self._job.parts(path)
                ]
            found[label] = _Change(group, weights, scales, grid.activations == "int8")
            self._restore()
        return found

    def _quantized(
        self, group: Group, name: str, weight: torch.Tensor, grid: Grid, factors: dict[int, Factor]
    ) -> Quantized:
        grid = fitted(name, grid, weight.shape[1])
        if grid.bits == 8:
            return min_max(weight, grid).as_stored()
        if grid.block_size not in factors:
            factors[grid.block_size] = factor(self._hessians[group.paths[0]], grid.block_size)
        return gptq(weight, factors[grid.block_size], grid).as_stored()

    def _run(self, changes: Sequence[_Change], hidden: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The layer's outputs with these changes, by row."""
        import torch

        hooks, prompts = [], [places[0] if places else 0 for places in self._walk._places]
        row = 0
        for change in changes:
            for path, parts in change.weights.items():
                weight = torch.cat([one.dequantize() for one in parts])
                self._layer.get_submodule(path).weight = torch.nn.Parameter(weight, requires_grad=False)
                if change.rounds:

                    def hook(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
                        return (as_read(args[0], prompts[row]), *args[1:])

                    hooks.append(self._layer.get_submodule(path).register_forward_pre_hook(hook))
            if change.scales is not None and change.group.maker is not None:
                self._own([change.group.maker])
                divide(self._layer.get_submodule(change.group.maker), change.scales)
        found = []
        for row, one in enumerate(hidden):
            out = self._layer(one, **self._walk._states.extra[row][self._number])
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


@dataclass
class _Change:
    """A group on a candidate.

    Attributes:
        weights: the parts of each linear layer, by its path.
        scales: what the inputs' channels are divided by, or None.
        rounds: whether inputs are rounded to 8 bits.
    """

    group: Group
    weights: dict[str, list[Quantized]]
    scales: torch.Tensor | None
    rounds: bool


def as_read(inputs: torch.Tensor, prompt: int) -> torch.Tensor:
    """Inputs (1, tokens, channels) rounded to 8 bits as at run time: a prompt 64 tokens at a time, then token by token."""
    import torch

    flat = inputs.flatten(0, -2)
    parts = [round_inputs(part) for part in flat[:prompt].split(_CHUNK)] if prompt else []
    rest = flat[prompt:]
    if len(rest):
        low, high = rest.amin(-1, keepdim=True).clamp(max=0), rest.amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low) / 255
        scale[scale == 0] = 1
        zero = (-low / scale).round()
        parts.append(((rest / scale).round_() + zero).clamp_(0, 255).sub_(zero).mul_(scale))
    return torch.cat(parts).view_as(inputs)


def _measured(one: dict[str, Any]) -> Measured:
    shapes = {name: (shape[0], shape[1]) for name, shape in one["shapes"].items()}
    return Measured(one["name"], shapes, one["kld"])
