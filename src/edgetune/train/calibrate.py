"""What a training will take, measured on the model's shape: three steps at two depths, and the line through them.

A transformer's layers are alike, so time and memory are those of the embedding and the head, plus as many times those of
one layer. The two shallow models have the real one's widths and random weights: nothing is loaded, and a model that does
not fit this machine can be planned on it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.data.batch import Encoded
from edgetune.models import Base, load_config
from edgetune.models.quiet import quiet
from edgetune.recipe import TrainSection
from edgetune.train.threads import threads

if TYPE_CHECKING:
    from edgetune.export.quantize.plan import Plan

_SHALLOW, _DEEP = 1, 9  # layers of the two models; the second one fewer where layers are large
_PARAMETERS = 150_000_000  # that the second model's layers have at most, if that leaves it two
_STEPS = 3  # the first one warms up


@dataclass(frozen=True)
class Calibration:
    """What one model, method and pass take on this machine.

    Attributes:
        parameters, trainable: of the whole model.
        weight_bytes: of the weights in memory.
        live_bytes: of embedding, head and two layers.
        step_s, forward_s: seconds of a pass of `tokens` with backward pass and optimizer, and of a forward pass alone.
        tokens: of the measured pass.
        once, twice: activations, kept or computed twice.
        runtime_mb: resident memory of the process without a model.
    """

    parameters: int
    trainable: int
    weight_bytes: float
    live_bytes: float
    step_s: float
    forward_s: float
    tokens: int
    once: Any
    twice: Any
    runtime_mb: float


@dataclass(frozen=True)
class _Measured:
    parameters: float
    trainable: float
    weight_bytes: float
    step_s: float
    forward_s: float
    once: tuple[float, float, float]
    twice: tuple[float, float, float]


def calibrate(
    section: TrainSection,
    base: Base,
    row_tokens: int,
    pass_tokens: int,
    trust_remote_code: bool,
    grids: Plan | None = None,
) -> Calibration:
    """Measure three steps.

    Args:
        section: the recipe's `train`.
        base: the model whose shape counts; its weights are not read.
        row_tokens: tokens of a usual row.
        pass_tokens: tokens of the measured pass, at least a row.
        trust_remote_code: run code that the base brings.
        grids: what is trained through, with `quantization_aware`.

    Raises:
        InputError: the method does not fit the model.
        OSError: no room for the shallow models (their weights go through the folder for temporary files).
    """
    import psutil

    with quiet(), threads(section.threads):
        config = load_config(base.path, trust_remote_code=trust_remote_code)
        layers = _depth(config)
        rows = [Encoded([1 + n % 97 for n in range(row_tokens)], _learned(row_tokens))]
        rows *= max(1, pass_tokens // row_tokens)
        found = []
        depths = (_SHALLOW, _second_depth(config, layers))
        for depth in depths:
            with _twin(config, depth, base, trust_remote_code) as twin:
                found.append(_measure(section, twin, rows, trust_remote_code, grids))
        gc.collect()
        runtime = psutil.Process().memory_info().rss / 1e6
    return _through(found, depths, layers, sum(len(row.ids) for row in rows), runtime)


def _learned(tokens: int) -> list[bool]:
    """About two in five tokens carry loss in chat rows."""
    return [n % 5 < 2 and n > 0 for n in range(tokens)]


def _depth(config: Any) -> int:
    return int(getattr(config, "num_hidden_layers", None) or config.get_text_config().num_hidden_layers)


def _cut(config: Any, depth: int) -> Any:
    """The configuration with fewer layers."""
    cut = copy.deepcopy(config)
    text = cut.get_text_config()
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == _depth(config) and name != "eos_token_id":
            setattr(text, name, value[:depth])  # a kind a layer, such as sliding and full attention
    text.num_hidden_layers = depth
    return cut


def _second_depth(config: Any, layers: int) -> int:
    if layers <= 2:
        return max(2, layers)
    import torch
    import transformers

    sizes = []
    for depth in (1, 2):
        with torch.device("meta"):
            sizes.append(transformers.AutoModelForCausalLM.from_config(_cut(config, depth)).num_parameters())
    return int(min(max(2, _PARAMETERS // max(1, sizes[1] - sizes[0])), _DEEP, layers))


@contextmanager
def _twin(config: Any, depth: int, base: Base, trust_remote_code: bool) -> Iterator[Base]:
    """A model folder of `depth` layers with random weights."""
    import torch
    import transformers

    with tempfile.TemporaryDirectory(prefix="edgetune-") as folder:
        before = torch.random.get_rng_state()
        model = transformers.AutoModelForCausalLM.from_config(
            _cut(config, depth), dtype=torch.bfloat16, trust_remote_code=trust_remote_code
        )
        torch.random.set_rng_state(before)
        model.save_pretrained(folder, safe_serialization=True)
        del model
        yield dataclasses.replace(base, path=Path(folder))


def _measure(
    section: TrainSection, twin: Base, rows: list[Encoded], trust_remote_code: bool, grids: Plan | None
) -> _Measured:
    import torch

    from edgetune.train import attention, memory, method
    from edgetune.train.objective import Objective
    from edgetune.train.optimizer import make_optimizer

    model = method.build(section, twin, trust_remote_code=trust_remote_code, attention=None, rows=rows)
    packed = section.packing is not False and attention.use(model)
    compute = method.base_dtype(section) if section.method == "full" else None
    objective = Objective(model, 0, packed, section.label_smoothing, compute)
    beside = 0.0
    if grids is not None:
        from edgetune.train.distill import learn_through
        from edgetune.train.grids import nearest

        begin = functools.partial(nearest, grids, twin)
        beside = learn_through(grids, begin, section.distillation, model, objective, twin).bytes(model)
    optimizer = make_optimizer(model, section, 1e-6)
    device = next(model.parameters()).device
    batch = {name: v.to(device) if torch.is_tensor(v) else v for name, v in objective.batch(rows).items()}
    model.train()
    times = []
    for _ in range(_STEPS):
        started = time.perf_counter()
        objective.loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - started)
    started = time.perf_counter()
    objective.score(model, rows)
    forward = time.perf_counter() - started
    del optimizer
    once = memory.activations(objective, model)
    memory.compute_twice(model)
    twice = memory.activations(objective, model)
    parameters = list(model.parameters())
    return _Measured(
        parameters=model.num_parameters(),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        weight_bytes=beside + sum(p.numel() * p.element_size() for p in parameters),
        step_s=min(times[1:]),
        forward_s=forward,
        once=dataclasses.astuple(once),
        twice=dataclasses.astuple(twice),
    )


def _through(
    found: list[_Measured], depths: tuple[int, int], layers: int, tokens: int, runtime_mb: float
) -> Calibration:
    from edgetune.train.memory import Activations

    def at(first: float, second: float) -> float:
        each = max(0.0, (second - first) / (depths[1] - depths[0]))
        return first + each * (layers - depths[0])

    shallow, deep = (dataclasses.asdict(one) for one in found)
    line = {name: at(shallow[name], deep[name]) for name in shallow if name not in ("once", "twice")}
    kept = {
        name: Activations(*(at(a, b) for a, b in zip(shallow[name], deep[name], strict=True)))
        for name in ("once", "twice")
    }
    return Calibration(
        parameters=round(line["parameters"]),
        trainable=round(line["trainable"]),
        weight_bytes=line["weight_bytes"],
        live_bytes=deep["weight_bytes"]
        + (deep["weight_bytes"] - shallow["weight_bytes"]) / (depths[1] - depths[0]) * (2 - depths[1]),
        step_s=line["step_s"],
        forward_s=line["forward_s"],
        tokens=tokens,
        once=kept["once"],
        twice=kept["twice"],
        runtime_mb=runtime_mb,
    )
