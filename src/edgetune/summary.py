"""What a run closes with: one table of what was reached, and the next command."""

from __future__ import annotations

from typing import Any

from edgetune.export.card import slower
from edgetune.run import Result
from edgetune.train.samples import beginning, ending

_WIDTH = 100  # characters of a sample that the table shows


def summary(result: Result) -> list[tuple[str, str]]:
    """Rows (what, value) of the closing table."""
    reports = result.reports
    rows: list[tuple[str, str]] = []
    if all(why is None for why in result.done.values()):
        rows.append(("stages", "nothing changed, nothing redone"))
    else:
        redone = [stage for stage, why in result.done.items() if why]
        kept = [stage for stage, why in result.done.items() if not why]
        rows.append(("stages", f"{', '.join(redone)} done" + (f"; {', '.join(kept)} unchanged" if kept else "")))
    if train := reports.get("train"):
        before, after = train["validation"]["before"], train["validation"]["after"]
        rows.append(("validation loss", f"{before['loss']:.3f} before → {after['loss']:.3f} after"))
        if through := train.get("quantization_aware"):
            plain = through["validation"]
            rows[-1] = ("validation loss, rounded", rows[-1][1])
            rows.append(("unrounded", f"{plain['before']['loss']:.3f} before → {plain['after']['loss']:.3f} after"))
        rows.append(
            (
                "training",
                f"{train['tokens_per_s'] or 0:.0f} tokens/s, {train['tokens']:,} tokens, "
                f"{train['steps']} steps, peak {train['peak_rss_mb']:,.0f} MB",
            )
        )
        for sample in train.get("samples", [])[:1]:  # the others are in `edgetune runs show`
            rows.append(("asked", ending(sample["prompt"], _WIDTH)))
            rows += [(f"answered {when}", beginning(sample[when], _WIDTH)) for when in ("before", "after")]
    if verify := reports.get("verify"):
        rows.append(("gate", "passed" if verify["passed"] else f"NOT PASSED: {'; '.join(verify['failures'])}"))
        rows.append(("KL to merged model", f"mean {verify['kld_mean']:.4f}, p99 {verify['kld_p99']:.4f} nats"))
        rows.append(("best token agrees", f"{verify['top1_agreement']:.1%} of {verify['tokens']:,} tokens"))
        rows.append(
            (
                "perplexity",
                f"{verify['perplexity']['merged']:.3f} merged → {verify['perplexity']['artifact']:.3f} artifact",
            )
        )
    if export := reports.get("export"):
        rows.append(("size on disk", f"{export['size_mb']:,.1f} MB"))
        if not (device := export.get("device", {"ran": True}))["ran"]:
            why = "the target" if device["provider"] == "cpu" else f"the provider {device['provider']}"
            rows.append(("on the device", f"checked, not run: {why} {device['why_not']}"))
    if bench := reports.get("bench"):
        rows.append(
            (
                "time to first token",
                f"{bench['ttft_ms']['p50']:.0f} ms for {bench['prompt_tokens']} prompt tokens",
            )
        )
        rows.append(("decode", f"{bench['decode_tokens_per_s']['p50']:.1f} tokens/s"))
        rows += [("slower here", said) for said in slower(reports)]
        rows.append(("peak memory", f"{bench['peak_rss_mb']:,.0f} MB while answering"))
    rows.append(("everything lies in", str(result.path)))
    rows.append(("next", next_command(result)))
    return rows


def next_command(result: Result) -> str:
    """The command that a person would type now."""
    if result.missed:
        return f"edgetune run {result.recipe} export.target=…"
    if export := result.reports.get("export"):
        if not export.get("device", {"ran": True})["ran"]:  # it is to be taken there
            return f"edgetune package {result.path / 'artifact'} --zip"
        return f"edgetune chat {result.path / 'artifact'}"
    return f"edgetune run {result.recipe}"


def as_json(result: Result) -> dict[str, Any]:
    """The same for programs."""
    return {
        "run": str(result.path),
        "stages": {stage: {"redone": why is not None, "why": why} for stage, why in result.done.items()},
        "passed": False if result.missed else True if "verify" in result.reports else None,
        "reports": result.reports,
        "next": next_command(result),
    }
