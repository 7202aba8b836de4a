"""`method: auto`: measure what each layer bears and what each product costs here, and choose grids by limits.

What was measured is kept in `home()/auto/`, by the model's hashes, the rows, the candidates and the versions: other
limits, or a run that was interrupted, go on from there.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune import progress
from edgetune.errors import InputError
from edgetune.export.quantize.auto_choice import Choice, Point, Rest, Wanted, as_json, describe
from edgetune.export.quantize.auto_cost import Costs, Timed
from edgetune.export.quantize.auto_predict import (
    BUILDER,
    all_timed,
    builder_points,
    guessed,
    measure_costs,
    options,
    rest,
    scales,
    smallest,
)
from edgetune.export.quantize.auto_sensitivity import Measured, measure, outline, read_measured
from edgetune.export.quantize.auto_time import About, about, cost_seconds, sensitivity_seconds, whole_seconds
from edgetune.export.quantize.auto_trial import METHODS
from edgetune.export.quantize.grid import Grid
from edgetune.export.quantize.plan import Plan
from edgetune.files import HashCache, digest, home, read_json, write_json
from edgetune.recipe import AutoSection

if TYPE_CHECKING:
    from edgetune.data.batch import Encoded

CANDIDATES = {
    "int4 block 32": Grid(4, 32, True),
    "int4 block 64": Grid(4, 64, True),
    "int8": Grid(8, 64),
    "int8 activations": Grid(8, activations="int8"),
}
HEADS = ("int4 block 32", "int8")  # a lookup has no activations, and a head's few rows gain nothing by them
_FORMAT = 4  # of what is kept
_LONGEST = 128  # tokens of a held-out row: rows differ more than the places in one
# Shares of the limits that the choice goes by. SmolLM2 had 1.25 times the divergence on rows that it was not trained on.
_IN_HAND = {"kld_mean": 0.75, "size_mb": 0.998}


@dataclass(frozen=True)
class Found:
    """What `auto` came to.

    Attributes:
        plan: a grid for each matrix, by its full name, and its method where that is not GPTQ.
        report: `limits`, `picked`, `groups` (what each got), `front`, `builder` (what is predicted of the model builder's own
            rounding), `scaled` (by candidate), `threads`, `seconds`.
    """

    plan: Plan
    report: dict[str, Any]


def find(
    merged: Path,
    wanted: AutoSection,
    calibration: Sequence[Encoded],
    held_out: Sequence[Encoded],
    context: int,
    report: Path | None,
    *,
    trust_remote_code: bool = False,
) -> Found:
    """Choose a grid and a method for each matrix of a model.

    Args:
        merged: transformers folder.
        wanted: the limits.
        calibration: rows to calibrate on.
        held_out: other rows, to measure on; see `split`.
        context: tokens of the artifact.
        report: existing folder that gets front.png, or None.

    Raises:
        InputError: nothing meets the limits (those of size and speed are looked at before divergences are measured), the model
            has no such layers, or a file of measured points is broken.
    """
    from edgetune.export.quantize.auto_plot import front_table, plot, read_points

    others = read_points(Path(wanted.points)) if wanted.points else []
    job, started = _Job(merged, _candidates(), calibration, held_out), time.monotonic()
    if left_out := [name for name in CANDIDATES if name not in job.candidates]:
        progress.say(f"auto: this processor computes {', '.join(left_out)} wrong, which is left out")
    job.say_time()
    units = job.units(trust_remote_code)
    measure_costs(job.costs, job.about, job.timed())
    common = rest(job.about, merged, context, job.costs)
    limits = Wanted(**wanted.limits)
    _require_reachable(units, job, common, limits)
    found = measure(
        merged,
        job.candidates,
        job.heads,
        [row.ids for row in calibration],
        held_out,
        job.kept,
        plain=BUILDER,
        trust_remote_code=trust_remote_code,
    )
    scaled = scales(found, job.candidates)
    choice = Choice(options(found.units, job.candidates, job.costs, scaled), common)
    front, point = choice.front(), _pick(choice, limits)
    builder = builder_points(found, job.about, merged, job.costs)
    others = [*builder, *others]
    progress.say(front_table(choice, front, point, others))
    progress.say(f"auto: predicted {describe(point)}, on {job.threads} threads")
    told: dict[str, Any] = {
        "limits": {name: value for name, value in wanted.limits.items() if value is not None},
        "picked": as_json(point),
        "groups": {unit.name: unit.options[at].label for unit, at in zip(choice.units, point.picks, strict=True)},
        "front": [as_json(one) | {"grids": counts(choice, one)} for one in front],
        "builder": builder,
        "scaled": {name: round(value, 3) for name, value in scaled.items()},
        "threads": job.threads,
        "seconds": round(time.monotonic() - started, 1),
    }
    write_json(job.kept / "front.json", told)
    plot(choice.all_points(), front, point, others, job.kept / "front.png")
    if report is not None:
        shutil.copyfile(job.kept / "front.png", report / "front.png")
    progress.say(f"auto: the front is drawn in {job.kept / 'front.png'}")
    return Found(_plan(choice, point), told)


def _plan(choice: Choice, point: Point) -> Plan:
    """A grid for every matrix, and a method where it is not GPTQ."""
    picked = [unit.options[at] for unit, at in zip(choice.units, point.picks, strict=True)]
    grids = {name: grid for option in picked for name, grid in option.grids.items()}
    methods = {
        name: option.method
        for option in picked
        for name in option.grids
        if option.method is not None and option.method != "gptq"
    }
    return Plan(Grid(4, 32, True), grids, "gptq", most_error=float("inf"), methods=methods)


class _Job:
    """What is measured, and what is kept of it from before.

    Attributes:
        kept: folder of what is measured of this model, with these rows and candidates.
        costs: of products on this processor.
    """

    def __init__(
        self,
        merged: Path,
        candidates: dict[str, Grid],
        calibration: Sequence[Encoded],
        held_out: Sequence[Encoded],
    ) -> None:
        from edgetune.runtime.hardware import default_threads

        self.merged, self.candidates = merged, candidates
        self.heads = [name for name in HEADS if name in candidates]
        self.calibration, self.held_out = calibration, held_out
        self.about, self.threads = about(merged), default_threads()
        self.kept = _folder(merged, candidates, calibration, held_out)
        self._outline = self.kept / "outline.json"
        self.costs = _costs_of(self.about, candidates, self.threads)

    def timed(self) -> list[Timed]:
        """The products that predictions need: by the model's groups, or by its configuration where these are not known yet."""
        groups = [unit.shapes for unit in self.units()] if self._outline.is_file() else self.about.groups()
        return all_timed(groups, self.candidates)

    def units(self, trust_remote_code: bool = False) -> list[Measured]:
        """The groups of matrices and their shapes, from a file where there is one."""
        if not self._outline.is_file():
            units = outline(self.merged, self.held_out[0].ids, trust_remote_code=trust_remote_code)
            write_json(self._outline, [vars(unit) for unit in units])
        return [read_measured(one) for one in read_json(self._outline)]

    def left(self) -> tuple[int, float, float]:
        """How many layers are left to measure, and seconds for them and for what products cost."""
        layers = self.about.shape.layers
        left = 0 if (self.kept / "ends.json").is_file() else layers - len(list(self.kept.glob("layer-*.json")))
        tokens = sum(len(row.ids) for row in self.calibration)
        seconds = (
            sensitivity_seconds(self.about, len(self.candidates), self.held_out, tokens, left) if left > 0 else 0.0
        )
        return left, seconds, cost_seconds(self.costs, self.about.shape, self.timed())

    def say_time(self) -> None:
        """Say how long it takes."""
        left, layers, costs = self.left()
        what = [f"{left} of {self.about.shape.layers} layers"] * bool(layers) + ["what products cost"] * bool(costs)
        if not what:
            progress.say(f"auto: what was measured before is taken from {self.kept}")
            return
        progress.say(
            f"auto: measuring {' and '.join(what)} takes about {progress.clock(layers + costs)} where nothing else runs; "
            "interrupted, it goes on from where it was"
        )


def _require_reachable(units: Sequence[Measured], job: _Job, common: Rest, limits: Wanted) -> None:
    """Refuse what no choice of grids can reach in size and speed, before divergences are measured. Raises InputError: so it is."""
    known = replace(limits, kld_mean=None)
    if not known.only_divergence:
        guesses = options(guessed(units, job.candidates, job.heads), job.candidates, job.costs, {})
        Choice(guesses, common, guessed=True).pick(known)


def _pick(choice: Choice, limits: Wanted) -> Point:
    """What the limits want, with something in hand where that can be: the gate reads other rows than these, and the files
    around the weights are known to some KB only. Raises InputError: nothing keeps the limits."""
    least = {name: share * value for name, share in _IN_HAND.items() if (value := getattr(limits, name)) is not None}
    with contextlib.suppress(InputError):
        return choice.pick(replace(limits, **least))
    return choice.pick(limits)


def counts(choice: Choice, point: Point) -> dict[str, int]:
    """How many units of a point have each candidate."""
    found: dict[str, int] = {}
    for unit, at in zip(choice.units, point.picks, strict=True):
        label = unit.options[at].label
        found[label] = found.get(label, 0) + 1
    return dict(sorted(found.items()))


def _candidates() -> dict[str, Grid]:
    """Those whose kernels this processor computes right."""
    from edgetune.runtime.kernels import KERNELS, wrong

    found = wrong()
    bad = {(one.bits, one.zero_points, one.activations) for one in KERNELS if one.name in found}
    candidates = {
        name: grid for name, grid in CANDIDATES.items() if (grid.bits, grid.zero_points, grid.activations) not in bad
    }
    if not any(name in candidates for name in HEADS):
        raise InputError(
            "this processor and this build of ONNX Runtime compute all kernels wrong that `auto` chooses from",
            where="export.target",
            fix="update onnxruntime, or choose a target without them (cpu-int8)",
        )
    return candidates


def split(rows: Sequence[Encoded], tokens: int) -> tuple[Sequence[Encoded], list[Encoded]]:
    """Training rows to calibrate on, and the last ones to measure on: as many as have so many tokens with loss, a quarter
    of all at most, each cut to 128 tokens, or to the first 64 with loss where these come later.

    Raises:
        InputError: these have no tokens with loss.
    """
    from edgetune.data.batch import cut

    found: list[Encoded] = []
    total = taken = 0
    for row in reversed(rows[-max(1, len(rows) // 4) :]):
        if total >= tokens:
            break
        taken += 1
        begins = next((at for at, learned in enumerate(row.learned) if learned and at), None)
        if begins is not None:
            short = cut(row, max(_LONGEST, begins + _LONGEST // 2))
            found.append(short)
            total += sum(short.learned[1:])
    if not found:
        raise InputError("no training row has tokens that carry loss to measure on", fix="give other rows (`--data`)")
    return rows[: len(rows) - taken] or rows, found


def _folder(
    merged: Path, candidates: dict[str, Grid], calibration: Sequence[Encoded], held_out: Sequence[Encoded]
) -> Path:
    """Where what is measured of this model, with these rows and candidates, is kept."""
    from edgetune.runtime.hardware import versions

    files = HashCache().folder(merged)
    model = {name: one for name, one in files.items() if name.endswith(".safetensors") or name == "config.json"}
    key = digest(
        {
            "format": _FORMAT,
            "model": model,
            "candidates": {name: str(grid) for name, grid in candidates.items()},
            "methods": METHODS,
            "beside": {name: str(grid) for name, grid in BUILDER.items()},
            "calibration": [list(row.ids) for row in calibration],
            "held_out": [[list(row.ids), [bool(one) for one in row.learned]] for row in held_out],
            "versions": versions("edgetune", "torch", "transformers"),
        }
    )
    kept = home() / "auto" / key[:16]
    kept.mkdir(parents=True, exist_ok=True)
    return kept


def _costs_of(model: About, candidates: dict[str, Grid], threads: int) -> Costs:
    """What products cost on this processor, whatever the model; but a small one stays in its caches."""
    from edgetune.runtime.hardware import cpu, versions

    least = smallest(model.groups(), candidates)
    key = digest({"cpu": cpu(), "threads": threads, **versions("onnxruntime"), "bytes": least >> 24})
    kept = home() / "auto" / f"costs-{key[:16]}"
    kept.mkdir(parents=True, exist_ok=True)
    return Costs(kept, threads, least)


def measuring(model: Path, wanted: AutoSection, calibration_tokens: int) -> float:
    """Seconds that measuring a model takes here where nothing of it is known but what products cost, as `edgetune plan`
    says it.

    Args:
        model: transformers folder, or another one of its shape.
        wanted: says how many tokens layers are measured on.
        calibration_tokens: of the target.

    Raises:
        InputError: its configuration does not say enough.
    """
    from edgetune.runtime.hardware import default_threads

    shape = about(model)
    costs, timed = _costs_of(shape, CANDIDATES, default_threads()), all_timed(shape.groups(), CANDIDATES)
    whole = whole_seconds(shape, len(CANDIDATES), wanted.tokens, calibration_tokens)
    return whole + cost_seconds(costs, shape.shape, timed)


def measuring_left(merged: Path, calibration: Sequence[Encoded], held_out: Sequence[Encoded]) -> float:
    """Seconds that `find` measures, less what is kept from before. Raises InputError: as `find`."""
    return sum(_Job(merged, _candidates(), calibration, held_out).left()[1:])
