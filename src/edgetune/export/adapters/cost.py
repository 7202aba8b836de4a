"""What adapters that are switched at run time cost in speed: beside the artifact stands one without their branches."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from edgetune.export.adapters.graph import without_branches
from edgetune.files import read_json, write_json
from edgetune.recipe import BenchOptions, BenchSection
from edgetune.run import MANIFEST, outputs
from edgetune.runtime.artifact import adapter_file
from edgetune.runtime.bench.compare import compare
from edgetune.runtime.prompt_cache import GRAPH
from edgetune.train.method import link


def bench_beside_merged(
    artifact: Path, section: BenchSection, out: Path | None, options: BenchOptions | None = None
) -> dict[str, Any]:
    """Measure an artifact with its adapter on, in turn with what it would be with the adapter merged.

    A merged artifact has the same products with other weights, and no branches; so the branches are taken out.

    Args:
        artifact: one that carries adapters.
        section: lengths, rounds, threads.
        out: folder that gets the report; None writes nothing.
        options: further workloads and ways, and the adapter that is on; see `edgetune.runtime.bench.measure.bench`.

    Returns:
        The report; its `comparison` is with the merged one.
    """
    with tempfile.TemporaryDirectory(prefix="edgetune-") as folder:
        plain = Path(folder)
        manifest = read_json(artifact / MANIFEST)
        left_out = {MANIFEST, "model.onnx", GRAPH, *map(adapter_file, manifest.pop("adapters"))}
        for file in artifact.iterdir():
            if file.name not in left_out:
                link(file, plain / file.name)
        without_branches(artifact / "model.onnx", plain / "model.onnx")
        name = f"{manifest['name']} with the adapter merged"
        write_json(plain / MANIFEST, {**manifest, "name": name, "outputs": outputs(plain)})
        return compare(artifact, plain, section, out, options or BenchOptions(loads=0))
