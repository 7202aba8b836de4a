"""`edgetune tune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetune.cli._common import Json, kept_if_ended, print_json, print_table

if TYPE_CHECKING:
    from edgetune.runtime.artifact import Artifact
    from edgetune.runtime.profile import Profile


def command(
    artifact: Annotated[Path, typer.Argument(help="An artifact or a run folder.", show_default=False)],
    seconds: Annotated[float, typer.Option(min=5, help="About how long it may measure.")] = 110,
    stress: Annotated[
        bool, typer.Option("--stress/--no-stress", help="Measure with a busy program on every core, too.")
    ] = True,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the device profile to this file as well.")
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Show what was measured before, and measure nothing.")] = False,
    forget: Annotated[bool, typer.Option("--forget", help="Delete what was measured before.")] = False,
    json: Json = False,
) -> None:
    """Measure which settings run an artifact fastest on this machine, and keep them.

    Threads, spinning, block sizes, affinity, pieces of a prompt and memory settings, each beside the best so far,
    on the machine as it is and with a busy program on every core. What is better beyond the noise, with the same
    tokens, goes into a device profile outside the artifact; bench, chat, generate and serve use it from then on,
    unless --threads or --no-profile says otherwise.

    \b
    Examples:
      edgetune tune runs/quickstart/artifact
      edgetune tune runs/quickstart --seconds 60 --no-stress
      edgetune tune runs/quickstart --show
    """
    from edgetune.errors import InputError
    from edgetune.leases import lease
    from edgetune.progress import say
    from edgetune.runtime.artifact import open_artifact
    from edgetune.runtime.profile import profile_path, save
    from edgetune.runtime.tune import tune

    if show and forget:
        raise InputError("--show and --forget exclude each other", fix="give one of them")
    if forget and out is not None:
        raise InputError("does not go with --forget", where="--out", fix="leave it out")
    if out is not None and out.is_dir():
        raise InputError("is a folder", where=out, fix="name a file for the profile")
    found = open_artifact(artifact)
    path = profile_path(found)
    if forget:
        there = path.exists()
        path.unlink(missing_ok=True)
        if json:
            print_json({"forgotten": there, "file": path})
        else:
            say("forgotten" if there else "there was no device profile")
        return
    if show:
        profile = _kept(found)
    else:
        with (
            lease(found.path, "edgetune tune"),
            kept_if_ended("nothing is kept: the profile is made when all is measured"),
        ):
            profile = tune(found, seconds, under_load=stress)
        save(profile, path)
    if out is not None:
        save(profile, out)
    if json:
        print_json({**profile.as_dict(), "file": path})
        return
    _print(profile)
    say(f"kept in {path}; `edgetune tune {artifact} --forget` deletes it")


def _kept(artifact: Artifact) -> Profile:
    from edgetune.errors import InputError
    from edgetune.runtime.profile import find

    profile, note = find(artifact)
    if profile is None:
        raise InputError(
            note or "there is no device profile of it for this machine",
            where=artifact.path,
            fix="measure one: `edgetune tune ARTIFACT`",
        )
    return profile


def _print(profile: Profile) -> None:
    measured = profile.measured
    rows = [
        (row["name"], *_factors(row.get("quiet")), _factor(row.get("loaded"), "whole"), _verdict(row))
        for row in measured["trials"]
    ]
    print_table(("tried", "prefill", "decode", "on a busy machine", ""), rows, "beside the best so far")
    typer.echo()
    states = [state for state in ("quiet", "loaded") if state in measured["before"]]
    columns = ("", *(f"{what}, {_STATES[state]}" for state in states for what in ("prefill", "decode")), "peak memory")
    print_table(columns, [_rates(name, measured[name], states) for name in ("before", "after")])
    if (net := measured.get("net")) is not None:
        typer.echo()
        typer.echo(_net(net))
    if costs := profile.settings.row_costs:
        typer.echo()
        shown = ", ".join(f"{rows} tokens {cost:.2f} steps" for rows, cost in costs.items())
        changed = "{differ} of {of} next tokens differ from reading one by one".format(**measured["guessing"])
        typer.echo(f"reading at once, for guessing ahead: {shown}; {changed}")


_STATES = {"quiet": "as it is", "loaded": "busy"}


def _factors(found: dict[str, Any] | None) -> tuple[str, str]:
    return _factor(found, "prefill"), _factor(found, "decode")


def _factor(found: dict[str, Any] | None, name: str) -> str:
    return f"{found[name]:.2f}×" if found else "-"


def _net(factor: float) -> str:
    if factor > 1:
        return f"all that was kept: {factor:.2f} times as fast as plain settings"
    return f"all of it together is no faster ({factor:.2f} times as fast as plain settings), so plain settings are kept"


def _verdict(row: dict[str, Any]) -> str:
    return "kept" if row["kept"] else row.get("note", "")


def _rates(name: str, found: dict[str, Any], states: list[str]) -> tuple[str, ...]:
    rates = [found[state][f"{what}_tokens_per_s"] for state in states for what in ("prefill", "decode")]
    return (name, *(f"{rate:,.1f} tokens/s" for rate in rates), f"{found['peak_rss_mb']:,.1f} MB")
