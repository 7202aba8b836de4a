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
from edgetune.export.quantize.auto_trial import Change, Trial
from edgetune.export.quantize.calibrate import decoder_layers, fitted, head_sums
from edgetune.export.quantize.gptq import factor, gptq
from edgetune.export.quantize.grid import Grid
from edgetune.export.quantize.plan import EMBEDDING, HEAD
from edgetune.export.quantize.rtn import min_max
from edgetune.export.quantize.states import embed, enter
from edgetune.export.quantize.weights import Weights, empty, skeleton
from edgetune.files import read_json, write_json

if TYPE_CHECKING:
    import torch


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
        steps = [len(layers) - number + 2 for number in range(len(layers))]  # trials go through all layers that follow
        with progress.task("measure what each layer bears", sum(steps) + len(layers)) as bar:
            walk.start(rows)
            for number, step in enumerate(steps):
                walk.layer(number)
                bar.advance(step)
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
        self._calibration = embed(
            self._model, self._layers, self._weights, self._weights.get(f"{EMBEDDING}.weight"), rows
        )
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
            for label, change in trial.changes(group).items():
                whole[label].append(change)
                variants.append(trial.run([change], self._states.hidden))
                owners.append((unit, label))
        for label, changes in whole.items():
            self._together[label] = trial.run(changes, self._together[label])
        for (unit, label), kld in zip(owners, self._divergences(variants, number + 1), strict=True):
            unit.kld[label] = kld
        return units

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
                    hessian = head_sums(model, self._calibration, self._tied)[0] if hessian is None else hessian
                    found = gptq(own.weight, factor(hessian, grid.block_size), grid)
                else:
                    found = min_max(own.weight, grid)
                with self._instead([embedding, head] if self._tied else [own], found.as_stored().dequantize()):
                    states = enter(model, self._layers, self._ids).hidden
                    unit.kld[label] = self._divergences([states], 0)[0]
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


def _measured(one: dict[str, Any]) -> Measured:
    shapes = {name: (shape[0], shape[1]) for name, shape in one["shapes"].items()}
    return Measured(one["name"], shapes, one["kld"])
