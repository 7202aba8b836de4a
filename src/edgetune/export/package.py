"""From a merged model to a whole artifact: graph, contract, card, manifest, and a first load as the device does it."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgetune import progress
from edgetune.errors import EdgetuneError, GateError
from edgetune.export.adapters.read import Adapter
from edgetune.export.card import card
from edgetune.export.decoder import export_decoder
from edgetune.export.graph_check import check_graph, check_greedy, check_places, golden_ids
from edgetune.export.quantize.smooth import Folded
from edgetune.export.quantized import NO_EXAMPLES, Examples
from edgetune.export.targets import Target, status_of
from edgetune.export.weight_check import compare_weights
from edgetune.files import folder_size, write_json, write_text
from edgetune.run import Work, seal
from edgetune.runtime.prompt_cache import GRAPH
from edgetune.runtime.providers import prepare

# How ONNX Runtime words that the CPU does not have an operator, or not for these types.
_NO_KERNEL = re.compile(r"NOT_IMPLEMENTED|Could not find an implementation")


def export(
    merged: Path,
    target: Target,
    max_length: int,
    *,
    name: str,
    chain: dict[str, Any],
    work: Work,
    trust_remote_code: bool,
    artifact: Path,
    report: Path,
    examples: Examples = NO_EXAMPLES,
    adapters: Sequence[Adapter] = (),
) -> dict[str, Any]:
    """Write a whole artifact and load it once.

    Args:
        merged: transformers folder.
        target: the device profile.
        max_length: context in tokens, capped at the model's own.
        name: the artifact's name.
        chain: `base` (id, revision, license, sha256) and the digests of data and adapter, for manifest and card.
        work: what is done, for the manifest.
        trust_remote_code: run code that the model's folder brings.
        artifact: existing, empty folder.
        report: existing folder for report.json and builder.log.
        examples: training rows, for a target that calibrates.
        adapters: what stays beside the weights; `merged` is then their base.

    Returns:
        The report; `failures` are limits of the target's `auto` that the artifact misses (see `size_error`).

    Raises:
        InputError: the model cannot be exported.
        EdgetuneError: the builder failed, or its artifact does not load or does not keep the chat contract.
    """
    folded = Folded()
    found = export_decoder(
        merged,
        target,
        max_length,
        artifact=artifact,
        report=report,
        name=name,
        examples=examples,
        adapters=adapters,
        folded=folded,
        trust_remote_code=trust_remote_code,
    )
    graphs = sorted(artifact.glob("*.onnx"))
    found["graphs"] = {file.name: check_graph(file, target) for file in graphs}
    here = status_of(target)
    found["device"] = {
        "provider": target.provider,
        "architecture": target.architecture,
        "ran": here.runs,
        "why_not": here.note,
    }
    if here.prepares:
        found["device"].update(_prepare(graphs, target.provider))
    if not here.runs:
        found["weights"] = compare_weights(
            merged, graphs[0], target.precision, folded.columns.keys() | folded.rows.keys()
        )

    def complete() -> None:
        write_text(artifact / "README.md", card(name, chain["base"], target, {"export": found}))
        told = {"adapters": found["adapters"]} if adapters else {}
        seal(artifact, work, name=name, task="text-generation", chain=chain, **told)

    complete()
    found["device"].update(_run_static(artifact) if target.static and not here.runs else _load(artifact, here.runs))
    if target.precision == "fp32":
        check_greedy(merged, artifact, trust_remote_code=trust_remote_code)
    found["size_mb"] = round(folder_size(artifact) / 1e6, 3)
    found["failures"] = _too_large(target, found["size_mb"])
    complete()  # with what came of running it
    check_places(artifact, merged, artifact)
    write_json(report / "report.json", found)
    return found


def _too_large(target: Target, size_mb: float) -> list[str]:
    """The limit of size that a finished artifact misses, in words; `auto` chose by a prediction."""
    most = target.quantization.auto.size_mb if target.quantization else None
    return [] if most is None or size_mb <= most else [f"size_mb {size_mb:.3f} is over {most:g}"]


def size_error(report: dict[str, Any], artifact: Path) -> GateError:
    """What is said, and what to try, when a finished artifact misses the limits that its grids were chosen by."""
    limit = report["quantization"]["auto"]["limits"]["size_mb"]
    return GateError(
        f"the artifact is not what was asked for: {'; '.join(report['failures'])}",
        where=artifact,
        fix=f"aim lower, at export.auto.size_mb={limit - 1.1 * (report['size_mb'] - limit):.3f}; what was measured is kept",
    )


def _prepare(graphs: list[Path], provider: str) -> dict[str, Any]:
    """Try to compile for a device that is not here: `prepared`, the providers' shares by graph, or `prepare_failed`, why not.

    The compiled graphs are not kept: they are for one kind of device, and each compiles its own at the first load.
    """
    with tempfile.TemporaryDirectory(prefix="edgetune-") as folder:
        try:
            return {"prepared": {file.name: prepare(file, provider, Path(folder) / file.name) for file in graphs}}
        except EdgetuneError as error:
            why = _why(error, graphs[0].parent)
            progress.say(f"export: note: {why}")
            return {"prepare_failed": why}


def _why(error: EdgetuneError, artifact: Path) -> str:
    """What an error says, for the card: without the folders of this machine."""
    return error.what.splitlines()[0].replace(f"{artifact.absolute()}/", "")


def _run_static(artifact: Path) -> dict[str, Any]:
    """Run graphs of fixed shapes on the CPU, where ONNX Runtime GenAI overruns their KV cache: by plain ONNX Runtime.

    Raises:
        EdgetuneError: they do not run, or give what is no number.
    """
    from edgetune.export.graph_reader import Graph
    from edgetune.export.readers import longest

    graph = Graph(artifact)
    logits = graph.logits(golden_ids(artifact, longest(artifact) - 1))
    after = graph.feed([int(logits[-1].argmax())])
    if not (logits.isfinite().all() and after.isfinite().all()):
        raise EdgetuneError("the graphs give what is no number", where=artifact.name, fix="report this model")
    return {"ran_on_cpu": True}


def _load(artifact: Path, runs: bool) -> dict[str, Any]:
    """Load the artifact as the device does, golden prompts included, and let it answer.

    Where its provider is not on this machine (`runs` is False), the CPU does it, as far as it has the operators.

    Returns:
        For the report: `ran_on_cpu`, and `cpu_says` where the CPU could not.
    """
    from edgetune.runtime.artifact import open_artifact
    from edgetune.runtime.options import GenerationOptions
    from edgetune.runtime.session import Session

    try:
        with Session(open_artifact(artifact), on_cpu=not runs) as session:
            answer = session.generate("Hello", GenerationOptions(max_tokens=4))
            for name in session.adapters:
                session.generate("Hello", GenerationOptions(max_tokens=1), adapter=name)
    except EdgetuneError as error:
        if runs or not _NO_KERNEL.search(str(error)):
            raise
        why = _why(error, artifact)
        progress.say(f"export: note: the CPU cannot run the graph: {why}")
        return {"ran_on_cpu": False, "cpu_says": why}
    if answer.completion_tokens < 1:
        raise EdgetuneError("the artifact loads, but generates nothing", where=artifact.name)
    if (artifact / GRAPH).is_file():
        _check_restoring(artifact)
    return {"ran_on_cpu": not runs}


def _check_restoring(artifact: Path) -> None:
    """Raise EdgetuneError unless a prompt that is taken up from disk is answered as one that was read."""
    from edgetune.runtime.artifact import open_artifact
    from edgetune.runtime.options import GenerationOptions
    from edgetune.runtime.session import Session

    found, options = open_artifact(artifact), GenerationOptions(max_tokens=4, logprobs=1)
    with (
        tempfile.TemporaryDirectory(prefix="edgetune-") as folder,
        Session(found, prompt_cache=Path(folder)) as session,
    ):
        words = "Hello "
        while (count := len(session.encode(words))) <= found.prefill_tokens:
            words += words[:60]
        if count + 4 > found.max_length:
            return  # no prompt has a whole piece and an answer
        session.read(words)
        session.forget()
        restored, read = session.generate(words, options), session.generate(words, options, reuse="off")
    if not restored.cached_tokens:
        progress.say(
            "export: note: a prompt could not be kept in the folder for temporary files, so taking one up was not tried"
        )
    elif (restored.ids, restored.logprobs) != (read.ids, read.logprobs):
        raise EdgetuneError(
            "a prompt that was kept on disk is answered otherwise than one that is read",
            where=f"{artifact.name}/{GRAPH}",
            fix="report this model",
        )
