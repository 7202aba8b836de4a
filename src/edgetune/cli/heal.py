"""`edgetune heal`: the artifact of a run, made again and repaired."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edgetune.cli._common import Json, print_json, print_table


def command(
    run: Annotated[Path, typer.Argument(help="A run with a merged model, such as runs/NAME.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Values that replace those of the run's recipe.", show_default=False
        ),
    ] = None,
    steps: Annotated[
        int, typer.Option(min=1, help="Optimizer steps. The time they take is said after the first ones.")
    ] = 100,
    json: Json = False,
) -> None:
    """Quantize a run's merged model again, and let codes and scales learn from it what rounding took; then verify.

    The run's training rows are the data, the merged model is the teacher. The run's recipe.json says afterwards how the
    artifact was made. Interrupted, the same command goes on. Exit 3 when the artifact does not pass the gate.

    \b
    Examples:
      edgetune heal runs/quickstart
      edgetune heal runs/quickstart export.target=cpu-int4 --steps 200
      edgetune heal runs/quickstart export.heal.learning_rate=5e-4 --json
    """
    from edgetune.standalone import heal_run
    from edgetune.summary import as_json, summary

    result = heal_run(run, steps, overrides or [])
    if json:
        print_json(as_json(result))
    else:
        print_table(("result", "value"), [_healed(result.reports["export"]["quantization"]["heal"]), *summary(result)])
    if result.missed:
        raise result.missed


def _healed(found: dict[str, Any]) -> tuple[str, str]:
    held = found["held_out"]
    before, after = held["before"], held["after"]
    return (
        "healed",
        f"KL {before['kld_mean']:.4f} → {after['kld_mean']:.4f}, best token agrees {before['top1_agreement']:.1%} → "
        f"{after['top1_agreement']:.1%} on {held['rows']} held-out training rows; step {found['best_step']} of "
        f"{found['steps_done']}",
    )
