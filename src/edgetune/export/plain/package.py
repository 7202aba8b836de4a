"""From a transformers folder to a whole artifact of an encoder or a sequence-to-sequence model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from edgetune import progress
from edgetune.errors import EdgetuneError, InputError
from edgetune.export.graph_check import check_graph, check_places
from edgetune.export.needs import Needs, needs, require_room
from edgetune.export.plain.card import card
from edgetune.export.plain.compare import OUTPUTS, compare, missed
from edgetune.export.plain.describe import describe, left_aside
from edgetune.export.plain.graphs import encoder_graph, load_for_graph, own_attention, seq2seq_graphs
from edgetune.export.plain.kinds import LOADERS, require_target
from edgetune.export.plain.texts import texts_for
from edgetune.export.plain.weights import to_eight_bits, write_graphs
from edgetune.export.targets import Target
from edgetune.files import folder_size, read_json, write_json, write_text
from edgetune.models import load_tokenizer
from edgetune.run import Work, seal
from edgetune.runtime.artifact import GOLDEN_FORMAT, open_any
from edgetune.runtime.memory import peak_rss_mb
from edgetune.runtime.plain.artifact import PlainArtifact
from edgetune.runtime.plain.description import DECODER_GRAPH, ENCODER_GRAPH, FILE, GRAPH, SEQ2SEQ, Description, Task

_COMPARED = 64  # rows of a file, at most
_GOLDEN = (
    "What is the capital of France?",
    "  Two  spaces,\ttabs, lines\n\nnaïve café, Straße, 東京, Привет, 👋🏽, 3.14159, x_i += 1;",
)
_COPIES = 6.0  # float32 copies of all weights at most, in torch, in its exporter and in the graph


def export_plain(
    folder: Path,
    task: Task,
    target: Target,
    max_length: int,
    *,
    name: str,
    chain: dict[str, Any],
    work: Work,
    artifact: Path,
    data: Path | None = None,
) -> dict[str, Any]:
    """Write a whole artifact, load it, and compare it with the model.

    Args:
        folder: transformers folder.
        task: what the model does; see `kinds.task_of`.
        target: the device profile.
        max_length: most tokens of a text, and of an answer; capped at the model's own.
        name: the artifact's name.
        chain: `base` (id, revision, license, sha256), for manifest and card.
        work: what is done, for the manifest.
        artifact: existing, empty folder.
        data: rows to compare on; texts that come with edgetune when None.

    Returns:
        The report: sizes, seconds, `compared` (see `compare.compare`), `failures` (limits that were missed).

    Raises:
        InputError: the model cannot be exported so, or the disk or memory is too small.
        EdgetuneError: the graph is not valid, does not load, or in float32 gives other numbers than the model.
    """
    started = time.monotonic()
    require_target(task, target)
    _require_room(folder, target, artifact)
    tokenizer = load_tokenizer(folder)
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise InputError(
            "its tokenizer is one of Python's; on the device there is none",
            where=folder,
            fix="give a model with a tokenizer.json",
        )
    texts = texts_for(task, data, _COMPARED)
    progress.say(f"export: a graph for {task}")
    model = load_for_graph(folder, LOADERS[task])
    description = _write(folder, task, target, model, tokenizer, max_length, artifact)
    graphs = {file: check_graph(artifact / file, target) for file in description.graphs}
    found: dict[str, Any] = {
        "task": task,
        "precision": target.precision,
        "provider": target.provider,
        "max_length": description.max_length,
        "graphs": graphs,
        "left_aside": left_aside(model) if task == SEQ2SEQ else [],
    }
    about = {"name": name, "base": chain["base"], "target": target, "description": description}
    write_text(artifact / "README.md", card(**about, report=found))
    seal(artifact, work, name=name, task=task, chain=chain)
    check_places(artifact, folder, artifact)
    with own_attention(model):
        found["compared"] = compare(_opened(artifact), model, texts, exact=target.precision == "fp32")
    found["failures"] = missed(found["compared"], target.limits)
    (artifact / "manifest.json").unlink()
    write_text(artifact / "README.md", card(**about, report=found))
    seal(artifact, work, name=name, task=task, chain=chain)
    _opened(artifact)
    found["files_mb"] = {path.name: round(path.stat().st_size / 1e6, 3) for path in sorted(artifact.iterdir())}
    found["size_mb"] = round(folder_size(artifact) / 1e6, 3)
    return {**found, "seconds": round(time.monotonic() - started, 1), "peak_rss_mb": round(peak_rss_mb(), 1)}


def _opened(artifact: Path) -> PlainArtifact:
    found = open_any(artifact)
    assert isinstance(found, PlainArtifact)
    return found


def _require_room(folder: Path, target: Target, artifact: Path) -> None:
    told = needs(folder, target)
    floats = 4.0 * told.parameters
    require_room(Needs(told.seconds, _COPIES * floats + 0.6e9, 2 * floats, told.size, told.parameters), artifact)


def _write(
    folder: Path, task: Task, target: Target, model: Any, tokenizer: Any, max_length: int, artifact: Path
) -> Description:
    """Graphs, weights, tokenizer and descriptions."""
    if task == SEQ2SEQ:
        encoder, decoder = seq2seq_graphs(model)
        models = {ENCODER_GRAPH: encoder, DECODER_GRAPH: decoder}
        description = describe(folder, task, model, tokenizer, max_length, layers=_layers(decoder))
    else:
        description = describe(folder, task, model, tokenizer, max_length)
        models = {GRAPH: encoder_graph(model, description.inputs, OUTPUTS[task])}
    if target.quantization is not None:
        made = [to_eight_bits(graph, target.quantization.block_size) for graph in models.values()]
        if not all(made):
            raise EdgetuneError("a graph has no matrix that can be rounded", where=folder, fix="export to cpu-fp32")
    write_graphs(models, artifact)
    write_json(artifact / FILE, description.as_dict())
    _write_tokenizer(tokenizer, artifact)
    lower = description.lower_case
    golden = [{"text": text, "ids": tokenizer(text.lower() if lower else text)["input_ids"]} for text in _GOLDEN]
    write_json(artifact / "golden.json", {"format": GOLDEN_FORMAT, "texts": golden})
    return description


def _layers(decoder: Any) -> int:
    return sum(value.name.endswith(".key") for value in decoder.graph.outputs)


def _write_tokenizer(tokenizer: Any, artifact: Path) -> None:
    """tokenizer.json, which neither cuts nor fills up texts: that is the runtime's; and what transformers reads beside it."""
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    for file in tokenizer.save_pretrained(artifact):
        if Path(file).name not in (
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "added_tokens.json",
        ):
            Path(file).unlink(missing_ok=True)
    config = read_json(artifact / "tokenizer_config.json")
    for key in ("is_local", "local_files_only", "name_or_path"):
        config.pop(key, None)
    write_json(artifact / "tokenizer_config.json", config)
