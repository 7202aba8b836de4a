"""Bench alone: an artifact's speed, into its card, too; with an adapter on, beside the graph without its branches."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgetune.progress import say
from edgetune.recipe import BenchOptions, BenchSection
from edgetune.runtime.artifact import open_artifact
from edgetune.runtime.bench.measure import bench, writable
from edgetune.standalone_verify import in_run


def bench_artifact(artifact: Path, section: BenchSection, out: Path | None, options: BenchOptions) -> dict[str, Any]:
    """Measure an artifact as a command does it.

    Where an adapter is on, one number of threads is asked for, and `onnx` is installed, the same graph without branches is
    measured in turn: what it would be with the adapter merged. The card of an artifact in no run has its numbers then, if
    it was measured on the provider that it is for, and read and wrote.

    Args:
        artifact, section, out, options: see `edgetune.runtime.bench.measure.bench`.

    Returns:
        The report.
    """
    from edgetune.export.card import stamp

    writable(out, artifact)
    found = open_artifact(artifact)
    on = found.adapter(options.adapter)
    if on is None or len(options.threads) > 1:
        report = bench(artifact, section, out, options)
    elif find_spec("onnx") is None:
        say("note: what the adapter costs is not measured, for which edgetune[export] must be installed")
        report = bench(artifact, section, out, options)
    else:
        from edgetune.export.adapters.cost import bench_beside_merged

        report = bench_beside_merged(found.path, section, out, options)
    bare = on is None and bool(found.adapters)  # its card tells of an adapter
    whole = all(report[name] for name in ("ttft_ms", "prefill_tokens_per_s", "decode_tokens_per_s"))
    if whole and not bare and options.provider is None and not options.stress and not in_run(found.path):
        stamp(found.path, "bench", report)
    return report
