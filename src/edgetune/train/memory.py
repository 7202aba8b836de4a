"""How much memory training takes: what autograd keeps of a forward pass is counted, not guessed."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch

from edgetune.data.batch import Encoded
from edgetune.errors import InputError
from edgetune.recipe import TrainSection
from edgetune.train import distributed
from edgetune.train.objective import Objective
from edgetune.train.schedule import DEFAULT_PASS_TOKENS

_SMALLEST_PASS = 256  # tokens; below it the matrix products slow down more than memory is worth
_SHARE = 0.7  # of the memory that is free: the rest is for gradients on their way, for the allocator and for others
_PROBE = (64, 192, 320)  # tokens of the rows that activations are counted on


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward pass keeps for its backward pass: `always`, `a_token`, and `a_pair` of tokens of one row."""

    always: float
    a_token: float
    a_pair: float

    def of(self, tokens: int, longest: int) -> float:
        """Bytes of a pass of `tokens` whose longest row has `longest`, at most."""
        return self.always + tokens * (self.a_token + self.a_pair * longest)


@dataclass(frozen=True)
class Fit:
    """What was chosen so that memory does: tokens a pass, whether activations are computed twice, and why."""

    pass_tokens: int
    checkpointing: bool
    why: str | None = None


def activations(objective: Objective, model: Any) -> Activations:
    """Count what the model keeps of three short passes, and take the parabola through them."""
    found = []
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _PROBE[-1]
    probe = [length * min(context, _PROBE[-1]) // _PROBE[-1] for length in _PROBE]
    for length in probe:
        row = Encoded([1 + n % 100 for n in range(length)], [True] * length)
        found.append(_kept(objective, model, row))
    solved = np.linalg.solve(np.vander(probe, 3, increasing=True), found)
    return Activations(*(max(float(value), 0.0) for value in solved))


def fit(section: TrainSection, objective: Objective, model: Any, longest: int) -> Fit:
    """Choose the pass, and whether to compute activations twice, by what is free on the model's device.

    Args:
        section: the recipe's `train`; what it says is taken.
        objective, model: on the device that trains. The model is set to what is chosen.
        longest: tokens of the longest row.

    Raises:
        InputError: not even the longest row alone fits.
    """
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    beside = optimizer_bytes(section, trainable, distributed.place().size)

    def twice() -> Activations:
        compute_twice(model)
        return activations(objective, model)

    return choose(section, lambda: activations(objective, model), twice, room(free(section, model), beside), longest)


def room(free_bytes: float, beside: float) -> float:
    """Bytes that activations may take where `free_bytes` are free beside the weights, and the optimizer takes `beside`."""
    return _SHARE * (free_bytes - beside)


def weight_bytes(section: TrainSection, whole: float, live: float, parameters: int, processes: int) -> float:
    """Bytes of the weights on one of `processes`.

    Args:
        section: names the engine.
        whole: of the whole model.
        live: of embedding, head and two layers, which an engine that divides the weights gathers at a time at least.
        parameters: of the whole model.
        processes: how many there are.
    """
    held = distributed.shares(section, processes)
    if held.weights == 1:
        return whole
    return min(whole, whole * held.weights + max(live, whole * min(1.0, held.live / parameters)))


def optimizer_bytes(section: TrainSection, trainable: int, processes: int) -> float:
    """Bytes beside weights and activations on one of `processes`, of `trainable` parameters."""
    exchanged = 0
    if section.distributed and section.distributed.engine == "deepspeed":
        exchanged = 4 * min(trainable, distributed.BUCKET)
    return trainable * distributed.shares(section, processes).trained + exchanged


def choose(
    section: TrainSection,
    once: Callable[[], Activations],
    twice: Callable[[], Activations],
    room: float,
    longest: int,
) -> Fit:
    """What `fit` chooses, from the activations alone.

    Args:
        section: the recipe's `train`; what it says is taken.
        once, twice: what the model keeps, and what it keeps when activations are computed twice; asked when needed.
        room: bytes for activations.
        longest: tokens of the longest row.

    Raises:
        InputError: not even the longest row alone fits.
    """
    wanted, again, why = section.pass_tokens or DEFAULT_PASS_TOKENS, section.gradient_checkpointing is True, None
    each = twice() if again else once()
    alone = each.of(longest, longest)
    if alone > room and section.gradient_checkpointing == "auto":
        why = (
            f"activations are computed twice: those of the longest row ({longest} tokens) take {alone / 1e9:.1f} GB, "
            f"{max(room, 0) / 1e9:.1f} GB are free for them"
        )
        again, each = True, twice()
        alone = each.of(longest, longest)
    if alone > room:
        raise InputError(
            f"training does not fit: the activations of the longest row ({longest} tokens) take {alone / 1e9:.1f} GB, "
            f"{max(room, 0) / 1e9:.1f} GB are free for them",
            where="data.max_length",
            fix="lower it, close other programs, leave train.gradient_checkpointing at auto, or take a smaller model",
        )
    if section.pass_tokens is None:
        while wanted > max(longest, _SMALLEST_PASS) and each.of(wanted, longest) > room:
            wanted //= 2
        if wanted < DEFAULT_PASS_TOKENS:
            why = why or f"{wanted} tokens a pass: {room / 1e9:.1f} GB are free for activations"
    return Fit(wanted, again, why)


def bound_kept_code() -> None:
    """Have oneDNN keep the code of fewer shapes than its 1,024, some 400 kB each; to be called before the first product.

    A pass has about 150 shapes, and each is used in every layer, so nothing is made twice in one pass.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "384")


def compute_twice(model: Any) -> None:
    """Have the model keep only its layers' inputs, and compute their activations again in the backward pass."""
    model.gradient_checkpointing_enable({"use_reentrant": False})


def free(section: TrainSection, model: Any) -> float:
    """Bytes that are free for this process on the device that trains, beside the weights."""
    here = distributed.place()
    if not torch.cuda.is_available():
        return float(psutil.virtual_memory().available) / here.here
    have = float(torch.cuda.mem_get_info(here.local_rank)[0])
    if next(model.parameters()).device.type == "cuda":
        return have
    # they come there when the engine takes them
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    return have - weight_bytes(section, whole, 0.0, sum(p.numel() for p in model.parameters()), here.size)


def _kept(objective: Objective, model: Any, row: Encoded) -> int:
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    device = next(model.parameters()).device
    batch = {name: v.to(device) if torch.is_tensor(v) else v for name, v in objective.batch([row]).items()}
    was_training = model.training
    model.train()
    with torch.random.fork_rng(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = objective.loss(model, batch)
    del loss
    model.train(was_training)
    return sum(sizes.values())
