"""How long `method: auto` measures, from a model's configuration, this processor's speed, and what is kept from before."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgetune.errors import InputError
from edgetune.export.quantize.auto_cost import Costs, Shape, Timed
from edgetune.export.quantize.plan import EMBEDDING, HEAD
from edgetune.files import read_json

if TYPE_CHECKING:
    from edgetune.data.batch import Encoded

_METHODS = 2  # of 4-bit codes
_SECONDS_A_CODE = (
    0.4e-6  # of GPTQ, and of scales with the least error, a weight, on a core of 90 * 10^9 operations a second
)
_SECONDS_A_COST = 1.0  # of a product: its graphs are made, and run for 0.4 s


@dataclass(frozen=True)
class About:
    """A model, as its configuration describes it.

    Attributes:
        words: of its vocabulary.
        tied: whether the embedding is the head.
        longest: its own context in tokens; 0 where it does not say.
    """

    shape: Shape
    words: int
    tied: bool
    longest: int

    @property
    def layer_weights(self) -> int:
        """How many weights the matrices of a layer have."""
        return sum(rows * columns for group in self._layer(0) for rows, columns in group.values())

    def groups(self) -> list[dict[str, tuple[int, int]]]:
        """(rows, columns) of all matrices by name, those that read one tensor together, as models of the Llama family
        have them."""
        ends = [HEAD] if self.tied else [HEAD, EMBEDDING]
        layers = [group for number in range(self.shape.layers) for group in self._layer(number)]
        return layers + [{name: (self.words, self.shape.hidden)} for name in ends]

    def _layer(self, number: int) -> list[dict[str, tuple[int, int]]]:
        hidden, inner = self.shape.hidden, self.shape.inner
        own, shared = (heads * self.shape.head_size for heads in (self.shape.heads, self.shape.kv_heads))
        attention, mlp = f"model.layers.{number}.self_attn", f"model.layers.{number}.mlp"
        return [
            {f"{attention}.{name}_proj": (rows, hidden) for name, rows in (("q", own), ("k", shared), ("v", shared))},
            {f"{attention}.o_proj": (hidden, own)},
            {f"{mlp}.gate_proj": (inner, hidden), f"{mlp}.up_proj": (inner, hidden)},
            {f"{mlp}.down_proj": (hidden, inner)},
        ]


def about(model: Path) -> About:
    """Read a model's configuration. Raises InputError: it does not say enough."""
    found = read_json(model / "config.json")
    found = found.get("text_config") or found
    try:
        hidden, layers, heads = found["hidden_size"], found["num_hidden_layers"], found["num_attention_heads"]
        inner, words = found["intermediate_size"], found["vocab_size"]
    except KeyError as error:
        raise InputError(
            f"its configuration does not say {error}, which `auto` needs",
            where=model / "config.json",
            fix="choose a target with a fixed choice of grids, such as cpu-int4",
        ) from error
    kv, size = found.get("num_key_value_heads") or heads, found.get("head_dim") or hidden // heads
    shape = Shape(layers, hidden, inner, heads, kv, size)
    tied = bool(found.get("tie_word_embeddings"))
    return About(shape, words, tied, int(found.get("max_position_embeddings") or 0))


def sensitivity_seconds(
    model: About, candidates: int, held_out: Sequence[Encoded], calibration_tokens: int, layers: int
) -> float:
    """Of measuring what so many of a model's layers bear.

    Args:
        candidates: how many grids are tried.
        held_out: the rows that are measured on.
        calibration_tokens: that are calibrated on.
        layers: that are left to measure.
    """
    tokens, places = sum(len(row.ids) for row in held_out), sum(sum(row.learned) for row in held_out)
    return _seconds(model, candidates, (tokens, places), calibration_tokens, layers)


def whole_seconds(model: About, candidates: int, tokens: int, calibration_tokens: int) -> float:
    """Of measuring all layers on rows that are not known yet, with so many tokens that carry loss."""
    return _seconds(model, candidates, (2 * tokens, tokens), calibration_tokens, model.shape.layers)  # prompts, too


def _seconds(model: About, candidates: int, held_out: tuple[int, int], calibration_tokens: int, layers: int) -> float:
    (tokens, places), body = held_out, model.layer_weights
    each = 2 * (tokens * body * (model.shape.layers / 2 + 1) + places * model.shape.hidden * model.words)
    work = layers * 4 * candidates * each + 2 * calibration_tokens * body * 2 * model.shape.layers
    speed = _gflops()
    return float(work / speed / 1e9 + layers * body * 2 * _METHODS * _SECONDS_A_CODE * 90 / speed)


def _gflops() -> float:
    """What torch multiplies here, 10^9 operations a second, by the processor's time: whatever else runs meanwhile."""
    import torch

    size, best = 1024, float("inf")
    matrix = torch.ones(size, size)
    for _ in range(3):
        start = time.process_time()
        matrix @ matrix
        best = min(best, time.process_time() - start)
    return 2 * size**3 / max(best, 1e-6) / 1e9 * torch.get_num_threads()


def cost_seconds(costs: Costs, shape: Shape, wanted: Sequence[Timed]) -> float:
    """Of timing those of these products that are not known yet, and what a token costs beside them."""
    return _SECONDS_A_COST * (sum(not costs.knows(one) for one in wanted) + 2 * (not costs.knows_rest(shape)))
