"""How much each unit of a model suffers from each candidate: the KL divergence that it alone brings, on held-out rows.

The rows run through the float model once. In each decoder layer every group of matrices that read the same tensor is
quantized with every candidate in turn, the layer's outputs with it are sent through the float layers that follow, and the
next-token distributions are compared. Weights are read layer by layer, as they are needed; what a layer came to is kept
in a file, so that an interrupted measurement goes on where it stopped.

Of the two ways to find 4-bit codes only the better one is measured so: see `auto_trial`. For the embedding and the head,
which are few, both are.

Divergences of single groups add up only while they are small. So one more run goes along for each candidate, in which all
groups up to here are quantized with it: what it comes to in the end says how a candidate's divergences are to be scaled.
Plain roundings go along in the same way, embedding and head included, to be compared with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from edgetune import progress
from edgetune.data.batch import Encoded
from edgetune.export.quantize.auto_trial import Change, Trial, ways_of
from edgetune.export.quantize.calibrate import decoder_layers, fitted, head_sums
from edgetune.export.quantize.gptq import factor, gptq
from edgetune.export.quantize.grid import Grid
from edgetune.export.quantize.plan import EMBEDDING, HEAD, Method
from edgetune.export.quantize.rtn import least_error, min_max
from edgetune.export.quantize.states import embed, enter
from edgetune.export.quantize.weights import Weights, empty, skeleton
from edgetune.files import read_json, write_json

if TYPE_CHECKING:
    import torch

_SHORT = 8  # tokens, where only shapes are asked for


@dataclass
class Measured:
    """One group of matrices.

    Attributes:
        name: as people read it: `model.layers.3 gate_proj+up_proj`.
        shapes: (rows, columns) of its matrices, by their full names.
        kld: mean KL divergence with a candidate, by the candidate's name.
        methods: of 4-bit codes, by the candidate's name: the one that was better.
    """

    name: str
    shapes: dict[str, tuple[int, int]]
    kld: dict[str, float] = field(default_factory=dict)
    methods: dict[str, Method] = field(default_factory=dict)


@dataclass
class Sensitivity:
    """What was measured.

    Attributes:
        units: all groups, those of the layers first.
        together: mean KL divergence with all groups of the layers on a candidate, by its name, and of each plain rounding
            of the whole model.
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
    plain: Mapping[str, Grid] = MappingProxyType({}),
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
        plain: grids by name that all matrices are rounded to as they are, and the head; a tied embedding shares 4-bit codes
            with it, and stays float32 else.
    """
    import torch

    if (kept / "ends.json").is_file():
        return _known(kept)
    model = skeleton(merged, trust_remote_code=trust_remote_code)
    layers, prefix = decoder_layers(model)
    with torch.inference_mode(), Weights(merged) as weights:
        walk = _Walk(model, layers, prefix, weights, candidates, plain, held_out, kept)
        steps = [len(layers) - number + 2 for number in range(len(layers))]  # trials go through all layers that follow
        with progress.task("measure what each layer bears", sum(steps) + len(layers)) as bar:
            walk.start(rows)
            for number, step in enumerate(steps):
                walk.layer(number)
                bar.advance(step)
            walk.ends(heads)
    return Sensitivity(walk.units, walk.together)


def outline(merged: Path, row: Sequence[int], *, trust_remote_code: bool = False) -> list[Measured]:
    """All groups, before anything is measured: one short row of token ids tells which matrices read the same tensor."""
    import torch

    model = skeleton(merged, trust_remote_code=trust_remote_code)
    layers, prefix = decoder_layers(model)
    units = []
    with torch.inference_mode(), Weights(merged) as weights:
        embedding = weights.get(f"{EMBEDDING}.weight")
        states = embed(model, layers, weights, embedding, [row[:_SHORT]])
        for number, layer in enumerate(layers):
            weights.fill(layer, f"{prefix}.{number}")
            trial = Trial(layer, f"{prefix}.{number}", number, {}, states, states, model.config)
            units += [Measured(group.name, group.shapes) for group in trial.groups]
            empty(layer)
    return units + _end_units(model, (embedding.shape[0], embedding.shape[1]))


def _end_units(model: Any, shape: tuple[int, int]) -> list[Measured]:
    """The head, and the embedding: apart, or as the one matrix that both are."""
    tied = model.config.get_text_config().tie_word_embeddings
    return [Measured(name, {name: shape}) for name in ([HEAD] if tied else [HEAD, EMBEDDING])]


def _known(kept: Path) -> Sensitivity:
    """What was measured to the end before."""
    ends = read_json(kept / "ends.json")
    layers = [read_json(file) for file in sorted(kept.glob("layer-*.json"))]
    return Sensitivity([read_measured(one) for found in [*layers, ends] for one in found["units"]], ends["together"])


class _Walk:
    def __init__(
        self,
        model: Any,
        layers: Any,
        prefix: str,
        weights: Weights,
        candidates: Mapping[str, Grid],
        plain: Mapping[str, Grid],
        held_out: Sequence[Encoded],
        kept: Path,
    ) -> None:
        self._model, self._layers, self._prefix, self._weights = model, layers, prefix, weights
        self._candidates, self._plain, self._kept = candidates, plain, kept
        self._ids = [list(row.ids) for row in held_out]
        self._places = [[at - 1 for at in range(1, len(row.ids)) if row.learned[at]] for row in held_out]
        self._tied = bool(model.config.get_text_config().tie_word_embeddings)
        self._wanted: list[torch.Tensor] = []  # log-probabilities by row (places, vocabulary)
        self._together: dict[str, list[torch.Tensor]] = {}  # hidden states by row, all groups so far on a grid
        self.units: list[Measured] = []
        self.together: dict[str, float] = {}

    def start(self, rows: Sequence[Sequence[int]]) -> None:
        """Read what is not a layer, run all rows up to the first one, and the held-out ones to the end."""
        self._calibration = embed(
            self._model, self._layers, self._weights, self._weights.get(f"{EMBEDDING}.weight"), rows
        )
        self._fill_ends()
        self._states = enter(self._model, self._layers, self._ids)
        hidden = [one[None] for one in self._states.hidden]
        for row, out in enumerate(self._through(hidden, 0)):
            self._wanted.append(self._scores(row, out[0]))
        self._together = {name: list(self._states.hidden) for name in self._candidates}
        embedding = self._model.get_input_embeddings()
        for name, grid in self._plain.items():
            shared = [embedding] if self._tied and grid.bits == 4 else []
            with self._instead(shared, self._rounded(embedding.weight, grid) if shared else None):
                self._together[name] = enter(self._model, self._layers, self._ids).hidden

    def layer(self, number: int) -> None:
        """Measure a layer's groups, or take what was measured; then run the float states through it."""
        file, states = self._kept / f"layer-{number:04d}.json", self._kept / f"layer-{number:04d}.safetensors"
        self._weights.fill(self._layers[number], f"{self._prefix}.{number}")
        if file.is_file():
            self._take(read_json(file), states)
            self._calibration.run(self._layers[number], number)
        else:
            units = self._try(number)
            self.units += units
            self._keep(file, states, units)
        self._states.run(self._layers[number], number)
        empty(self._layers[number])

    def _try(self, number: int) -> list[Measured]:
        """Measure each group of a layer with each candidate; the calibration rows and all groups together go on."""
        trial = Trial(
            self._layers[number],
            f"{self._prefix}.{number}",
            number,
            self._candidates,
            self._calibration,
            self._states,
            self._model.config,
        )
        units = [Measured(group.name, group.shapes) for group in trial.groups]
        variants, owners = list[list["torch.Tensor"]](), list[tuple[Measured, str]]()
        whole: dict[str, list[Change]] = {name: [] for name in self._candidates}
        for unit, group in zip(units, trial.groups, strict=True):
            for label, ways in trial.changes(group).items():
                change, outputs = trial.better(ways)
                whole[label].append(change)
                variants.append(outputs)
                owners.append((unit, label))
                if change.method:
                    unit.methods[label] = change.method
        whole |= {name: [trial.plain(group, grid) for group in trial.groups] for name, grid in self._plain.items()}
        for label, changes in whole.items():
            self._together[label] = trial.run(changes, self._together[label])
        for (unit, label), kld in zip(owners, self._divergences(variants, number + 1), strict=True):
            unit.kld[label] = kld
        return units

    def ends(self, heads: Sequence[str]) -> None:
        """Measure the head and the embedding, and all groups of the layers together."""
        head = self._model.get_output_embeddings()
        for name, rows in self._together.items():
            grid = self._plain.get(name)
            with self._instead([head] if grid else [], self._rounded(head.weight, grid) if grid else None):
                klds = [self._kld(row, hidden) for row, hidden in enumerate(rows)]
            self.together[name] = self._mean(klds)
        units = self._ends(heads)
        self.units += units
        write_json(self._kept / "ends.json", {"units": [vars(one) for one in units], "together": self.together})

    def _divergences(self, variants: Sequence[Sequence[torch.Tensor]], number: int) -> list[float]:
        """Mean KL divergence of each variant, given its hidden states by row, before a layer."""
        import torch

        hidden = [torch.stack([variant[row] for variant in variants]) for row in range(len(self._ids))]
        klds: list[list[torch.Tensor]] = [[] for _ in variants]
        for row, out in enumerate(self._through(hidden, number)):
            for at, one in enumerate(out):
                klds[at].append(self._kld(row, one))
        return [self._mean(one) for one in klds]

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

        self.units += [read_measured(one) for one in found["units"]]
        if states.is_file():  # only those of the last layer that was measured are kept
            tensors = load_file(str(states))
            self._together = {
                name: [tensors[f"{name}/{row}"] for row in range(len(self._ids))] for name in self._together
            }

    def _ends(self, heads: Sequence[str]) -> list[Measured]:
        """Both with each candidate, and 4 bits in each way."""
        model = self._model
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        units = _end_units(model, tuple(head.weight.shape))
        hessian = head_sums(model, self._calibration, self._tied)[0]
        for label in heads:
            for unit in units:
                own = head if unit.name == HEAD else embedding
                grid = fitted(unit.name, self._candidates[label], own.weight.shape[1])
                for method in ways_of(grid):
                    if method == "least_error":
                        found = least_error(own.weight, grid)
                    elif method and unit.name == HEAD:
                        found = gptq(own.weight, factor(hessian, grid.block_size), grid)
                    else:  # a lookup has no inputs to go by
                        found = min_max(own.weight, grid)
                    with self._instead([embedding, head] if self._tied else [own], found.as_stored().dequantize()):
                        states = enter(model, self._layers, self._ids).hidden
                        kld = self._divergences([states], 0)[0]
                    if label not in unit.kld or kld < unit.kld[label]:
                        unit.kld[label] = kld
                        unit.methods |= {label: method} if method else {}
        return units

    @staticmethod
    def _rounded(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
        return min_max(weight, grid).dequantize()

    @contextlib.contextmanager
    def _instead(self, modules: Sequence[Any], weight: torch.Tensor | None) -> Iterator[None]:
        """Modules with another weight; None where there are none."""
        import torch

        own = [module.weight for module in modules]
        for module in modules:
            assert weight is not None
            module.weight = torch.nn.Parameter(weight, requires_grad=False)
        yield
        for module, weight in zip(modules, own, strict=True):
            module.weight = weight


def read_measured(one: dict[str, Any]) -> Measured:
    """A group from a file that has its attributes."""
    shapes = {name: (shape[0], shape[1]) for name, shape in one["shapes"].items()}
    return Measured(one["name"], shapes, one["kld"], one["methods"])
