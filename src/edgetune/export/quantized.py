"""Our own quantization, between the merged model and the model builder: a checkpoint that the builder reads."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune import progress
from edgetune.data.batch import Encoded, cut
from edgetune.errors import InputError
from edgetune.export.quantize.calibrate import quantize_model
from edgetune.export.quantize.checkpoint import Checkpoint
from edgetune.export.quantize.kept import load
from edgetune.export.quantize.section import QuantizationSection

if TYPE_CHECKING:
    import torch

    from edgetune.export.quantize.grid import Quantized
    from edgetune.export.quantize.plan import Plan
    from edgetune.export.quantize.smooth import Folded
    from edgetune.export.targets import Target
    from edgetune.recipe import HealSection

# How the builder reads such a checkpoint: fused matrices would need one grid for their parts, and its own way to share
# a tied embedding writes graphs that do not load.
BUILDER_OPTIONS = {"fuse_qkv": "false", "shared_embeddings": "false"}
_ROWS = 512  # of a run's rows that are read for calibration, at most
_LONGEST = 1024  # tokens of a row that are calibrated on: attention's memory grows with their square


@dataclass(frozen=True)
class Examples:
    """What an export may learn from.

    Attributes:
        rows: training rows.
        heal: the recipe's `export.heal`; nothing is repaired when None or without steps.
        seed: of what healing draws.
        checkpoints: existing folder that outlives a crash, from which healing goes on; none when None.
        where: the place of the rows, for a message.
        trained: the file of matrices that were trained on their grids (`quantize.kept`); none when None.
    """

    rows: Sequence[Encoded] = ()
    heal: HealSection | None = None
    seed: int = 42
    checkpoints: Path | None = None
    where: str = "data.train"
    trained: Path | None = None

    @staticmethod
    def wanted(target: Target, heal: HealSection) -> int | None:
        """How many rows an export with this target reads: None for all."""
        if heal.steps and target.quantization:
            return None
        return _ROWS if target.calibrates else 0


NO_EXAMPLES = Examples()


def calibration_rows(rows: Sequence[Encoded], tokens: int) -> list[Encoded]:
    """The first rows that have so many tokens together, each cut to 1,024."""
    found: list[Encoded] = []
    total = 0
    for row in rows:
        if total >= tokens:
            break
        found.append(cut(row, _LONGEST))
        total += len(found[-1].ids)
    return found


def write_checkpoint(
    folder: Path,
    merged: Path,
    section: QuantizationSection,
    examples: Examples,
    *,
    context: int = 2048,
    told: Path | None = None,
    folded: Folded | None = None,
    trust_remote_code: bool = False,
) -> tuple[list[str], dict[str, Any]]:
    """Quantize a merged model into a checkpoint that the model builder reads.

    Args:
        folder: existing, empty folder.
        merged: transformers folder.
        section: the target's `quantization`.
        examples: rows to calibrate on, as many as the section wants, and to heal on.
        context: the artifact's, in tokens.
        told: existing folder for what `method: auto` draws; nothing is drawn there when None.
        folded: takes what smoothing divided by.

    Returns:
        The matrices that `graph.finish` is to give the kernel for int8 activations, and what the report says: `grids` (how
        many matrices have each), `spared` (matrices that could not bear int8 activations, and the error), `auto` (what it
        measured and chose), `heal`, seconds.

    Raises:
        InputError: rows are needed and not given, or the model cannot be quantized so.
    """
    started = time.monotonic()
    plan, rows = section.plan(), examples.rows
    more: dict[str, Any] = {}
    if section.method == "auto":
        plan, rows, more["auto"] = _auto(merged, section, rows, context, told, trust_remote_code)
    chosen = _chosen(plan, rows, section.calibration_tokens)
    writer = Checkpoint(folder, merged, plan)
    healing = examples.heal is not None and examples.heal.steps > 0
    found: dict[str, Quantized] = {}
    floats: dict[str, torch.Tensor] = {}
    spared = quantize_model(
        merged,
        plan,
        [row.ids for row in chosen],
        found.__setitem__ if healing else writer.keep,
        given=load(examples.trained) if examples.trained else {},
        keep_float=floats.__setitem__ if healing else writer.keep_float,
        layer_done=writer.layer_done,
        folded=folded,
        trust_remote_code=trust_remote_code,
    )
    report = {
        "method": plan.method,
        **({"methods": dict(plan.methods)} if plan.methods else {}),
        "calibration_tokens": sum(len(row.ids) for row in chosen),
        "spared": {name: round(error, 5) for name, error in spared.items()},
        **more,
    }
    if spared:
        progress.say(f"export: {len(spared)} matrices do not bear int8 activations and keep 8-bit weights only")
    if healing:
        report["heal"] = _heal(merged, examples, found, floats, writer, trust_remote_code)
    writer.finish(trust_remote_code=trust_remote_code)
    return writer.int8, {
        **report,
        "grids": writer.grids(),
        "weights_mb": round(writer.weight_bytes / 1e6, 3),
        "seconds": round(time.monotonic() - started, 1),
    }


def _auto(
    merged: Path,
    section: QuantizationSection,
    rows: Sequence[Encoded],
    context: int,
    told: Path | None,
    trust_remote_code: bool,
) -> tuple[Plan, Sequence[Encoded], dict[str, Any]]:
    """The plan that was chosen, the rows that it was not measured on, and what the report says of it."""
    from edgetune.export.quantize.auto import find

    rest, calibration, held_out = _split(section, rows)
    found = find(merged, section.auto, calibration, held_out, context, told, trust_remote_code=trust_remote_code)
    return found.plan, rest, found.report


def _split(
    section: QuantizationSection, rows: Sequence[Encoded]
) -> tuple[Sequence[Encoded], list[Encoded], list[Encoded]]:
    """The rows that `auto` does not measure on, those of them that it calibrates on, and those that it measures on."""
    from edgetune.export.quantize.auto import split

    _chosen(section.plan(), rows, section.calibration_tokens)  # raises where there are none
    rest, held_out = split(rows, section.auto.tokens)
    return rest, calibration_rows(rest, section.calibration_tokens), held_out


def measuring_seconds(merged: Path, section: QuantizationSection | None, examples: Examples) -> float:
    """How long an export measures before it quantizes (`method: auto`), less what is kept from before."""
    if section is None or section.method != "auto":
        return 0.0
    from edgetune.export.quantize.auto import measuring_left

    _, calibration, held_out = _split(section, examples.rows)
    return measuring_left(merged, calibration, held_out)


def _heal(
    merged: Path,
    examples: Examples,
    found: dict[str, Quantized],
    floats: dict[str, torch.Tensor],
    writer: Checkpoint,
    trust_remote_code: bool,
) -> dict[str, Any]:
    from edgetune.export.quantize.heal import heal

    assert examples.heal is not None
    healed = heal(
        merged,
        found,
        examples.rows,
        examples.heal,
        seed=examples.seed,
        floats=floats,
        checkpoints=examples.checkpoints,
        trust_remote_code=trust_remote_code,
    )
    for name, tensor in floats.items():
        writer.keep_float(name, tensor)
    for name, one in healed.found.items():
        writer.keep(name, one)
    writer.layer_done()
    return healed.report


def check_kernels(section: QuantizationSection) -> None:
    """Raise InputError where this processor, on which the graph is to run, computes a kernel wrong that the target wants.
    `method: auto` leaves such kernels out."""
    from edgetune.runtime.kernels import KERNELS, wrong

    if section.method == "auto":
        return
    plan = section.plan()
    wanted = {(grid.bits, grid.zero_points, grid.activations) for grid in (plan.default, *plan.modules.values())}
    found = wrong()
    bad = [one.name for one in KERNELS if one.name in found and (one.bits, one.zero_points, one.activations) in wanted]
    if bad:
        raise InputError(
            f"this processor and this build of ONNX Runtime compute {bad[0]} wrong, by {found[bad[0]]:.0%}",
            where="export.target",
            fix="update onnxruntime, or use a target without it (zero_points: false, activations: float)",
        )


def _chosen(plan: Plan, rows: Sequence[Encoded], tokens: int) -> list[Encoded]:
    if not plan.calibrated:
        return []
    require_examples(len(rows))
    return calibration_rows(rows, tokens)


def require_examples(rows: int) -> None:
    """Raise InputError where a target that calibrates is given no rows."""
    if not rows:
        raise InputError(
            "this target calibrates on examples, and none are given",
            where="export.target",
            fix="give them (`--data FILE`), or choose a target that needs none, such as cpu-int8",
        )
