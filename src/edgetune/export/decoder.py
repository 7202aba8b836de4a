"""A decoder's ONNX artifact, made by the ONNX Runtime GenAI model builder."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgetune import progress
from edgetune.errors import InputError
from edgetune.export.adapters.graph import add_branches, write_adapter
from edgetune.export.adapters.read import Adapter
from edgetune.export.builder import build
from edgetune.export.contract import write_contract
from edgetune.export.kv_cache import write_scales
from edgetune.export.needs import needs
from edgetune.export.preflight import require_rows
from edgetune.export.qdq import to_static
from edgetune.export.quantize.smooth import Folded
from edgetune.export.quantized import BUILDER_OPTIONS, NO_EXAMPLES, Examples, measuring_seconds, write_checkpoint
from edgetune.export.restore_graph import write_restore_graph
from edgetune.export.targets import Target
from edgetune.export.window import write_windows
from edgetune.files import TMP_PREFIX, write_json, write_text
from edgetune.models import context_length, load_config, stop_ids
from edgetune.runtime import kernels
from edgetune.runtime.artifact import adapter_file
from edgetune.runtime.providers import PROVIDERS


def export_decoder(
    merged: Path,
    target: Target,
    max_length: int,
    *,
    artifact: Path,
    report: Path,
    name: str,
    examples: Examples = NO_EXAMPLES,
    adapters: Sequence[Adapter] = (),
    folded: Folded | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write the graph, the weights, the tokenizer, the runtime configuration and the chat contract.

    Args:
        merged: transformers folder, which `preflight` found fit.
        target: the device profile.
        max_length: context of the artifact in tokens; capped at the model's own.
        artifact: existing, empty folder; the model card and the manifest are added by the caller.
        report: existing folder for builder.log.
        name: the artifact's name, for catalogs.
        examples: training rows, for a target that calibrates.
        adapters: what stays beside the weights; `merged` is then their base.
        folded: takes what smoothing divided by.
        trust_remote_code: run code that the model's folder brings.

    Returns:
        What the report says of it: sizes in MB, the context in tokens, seconds, peak memory of the builder in MB.

    Raises:
        InputError: too few rows, or the builder cannot export the model, or the disk or the memory was too small.
        EdgetuneError: the builder failed; its log is kept and named.
    """
    steps = examples.heal.steps if examples.heal else 0
    require_rows(target, steps, len(examples.rows), sum(len(row.ids) for row in examples.rows), where=examples.where)
    told = needs(merged, target, steps=steps)
    seconds = told.seconds + measuring_seconds(merged, target.quantization, examples)
    progress.say(f"export: about {progress.clock(seconds)} and {told.memory / 1e6:,.0f} MB of memory")
    started = time.monotonic()
    context = context_length(merged)
    limit = min(max_length, context)
    more: dict[str, Any] = {}
    log, folded = report / "builder.log", folded or Folded()
    if target.kv_cache == "int8":
        scales = write_scales(
            merged, [row.ids for row in examples.rows], report / "kv_scales.json", trust_remote_code=trust_remote_code
        )
        target = target.model_copy(update={"options": {**target.options, **scales}})
    if target.quantization:
        peak, more["quantization"] = _quantize_and_build(
            merged, target, artifact, log, examples, limit, folded, trust_remote_code, name
        )
    else:
        peak = build(merged, target, artifact, log, name, trust_remote_code=trust_remote_code)
    _check_files(merged, artifact)
    if adapters:
        more["adapters"] = _put_adapters(merged, artifact, adapters, folded, trust_remote_code)
    config = json.loads((artifact / "genai_config.json").read_text(encoding="utf-8"))
    write_windows(artifact, merged, config, trust_remote_code=trust_remote_code)
    if target.static:
        write_json(artifact / "genai_config.json", config)
        more["static"] = to_static(artifact, target.static, limit, [row.ids for row in examples.rows])
        config = json.loads((artifact / "genai_config.json").read_text(encoding="utf-8"))
    ids = stop_ids(merged)
    config["model"]["eos_token_id"] = ids if len(ids) > 1 else ids[0]
    _name_provider(config, target)
    if target.quantization:
        config["model"]["context_length"] = limit  # the graph has no angles for positions beyond
    config["search"]["max_length"] = limit  # ONNX Runtime GenAI allocates the KV cache for this length
    write_json(artifact / "genai_config.json", config)
    if target.provider == "cpu" and not target.static:
        write_restore_graph(artifact, config)
    tokenizer = json.loads((artifact / "tokenizer_config.json").read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only", "name_or_path"):
        tokenizer.pop(key, None)
    write_json(artifact / "tokenizer_config.json", tokenizer)
    words = json.loads((artifact / "tokenizer.json").read_text(encoding="utf-8"))
    write_text(artifact / "tokenizer.json", json.dumps(words, ensure_ascii=False, separators=(",", ":")))
    write_contract(merged, artifact, ids, name, trust_remote_code=trust_remote_code)
    return {
        "precision": target.precision,
        "provider": target.provider,
        "max_length": limit,
        "model_context": context,
        "stop_ids": ids,
        "files_mb": {path.name: round(path.stat().st_size / 1e6, 3) for path in sorted(artifact.iterdir())},
        "seconds": round(time.monotonic() - started, 1),
        "builder_peak_rss_mb": peak,
        **more,
    }


def _quantize_and_build(
    merged: Path,
    target: Target,
    artifact: Path,
    log: Path,
    examples: Examples,
    context: int,
    folded: Folded,
    trust_remote_code: bool,
    name: str,
) -> tuple[float, dict[str, Any]]:
    """Quantize the weights ourselves, and have the builder make the graph of them."""
    from edgetune.export.quantize.graph import finish

    section = target.quantization
    assert section is not None
    target = target.model_copy(update={"options": {**BUILDER_OPTIONS, **target.options}})
    with tempfile.TemporaryDirectory(prefix=f"{TMP_PREFIX}quantized-", dir=artifact.parent) as folder:
        checkpoint = Path(folder)
        int8, found = write_checkpoint(
            checkpoint,
            merged,
            section,
            examples,
            context=context,
            told=log.parent,
            folded=folded,
            trust_remote_code=trust_remote_code,
        )
        peak = build(checkpoint, target, artifact, log, name, trust_remote_code=trust_remote_code)
        unsigned = section.unsigned or (section.method == "auto" and bool(int8) and kernels.overflows())
        finish(
            artifact / "model.onnx",
            checkpoint,
            int8,
            context,
            unsigned=unsigned,
            on_cpu=target.provider == "cpu",
            plain_lookup="GatherBlockQuantized" in target.graph.forbidden_ops,
        )
    return peak, found


def _put_adapters(
    base: Path, artifact: Path, adapters: Sequence[Adapter], folded: Folded, trust_remote_code: bool
) -> dict[str, dict[str, Any]]:
    """Give the graph its branches, and write a file for each adapter. Returns what the manifest says of them."""

    config = load_config(base, trust_remote_code=trust_remote_code)
    products = add_branches(artifact / "model.onnx", adapters, config)
    found = {}
    for adapter in adapters:
        write_adapter(artifact / adapter_file(adapter.name), adapter, products, folded)
        found[adapter.name] = {
            "rank": adapter.rank,
            "layers": sorted({part.rpartition(".")[2] for part in adapter.parts}),
            "sha256": adapter.digest,
        }
    return found


def _name_provider(config: dict[str, Any], target: Target) -> None:
    """Have ONNX Runtime GenAI load the graph on the target's provider, where the builder does not say so itself."""
    if target.provider != "cpu" and (options := PROVIDERS[target.provider].options) is not None:
        session = config["model"]["decoder"].setdefault("session_options", {})
        session["provider_options"] = [{PROVIDERS[target.provider].genai: options}]
    if target.provider != "cpu" and not PROVIDERS[target.provider].shares_cache:
        config["search"]["past_present_share_buffer"] = False


def _check_files(merged: Path, artifact: Path) -> None:
    """Raise InputError unless the builder wrote all that is read from here on."""
    missing = [
        name
        for name in ("genai_config.json", "tokenizer.json", "tokenizer_config.json")
        if not (artifact / name).is_file()
    ]
    if not any(artifact.glob("*.onnx")):
        missing.append("its graph")
    if missing:
        raise InputError(
            f"the model builder made no {', '.join(missing)} of this model",
            where=merged,
            fix="give a model that generates text and has a fast tokenizer (tokenizer.json)",
        )
