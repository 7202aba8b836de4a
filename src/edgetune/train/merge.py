"""Merging: the adapter folded into the base in float32, and the proof that nothing else changed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgetune import progress
from edgetune.errors import EdgetuneError, InputError
from edgetune.files import write_json
from edgetune.models import Base, load_model, load_tokenizer
from edgetune.models.check import check_safetensors
from edgetune.models.quiet import quiet
from edgetune.recipe import MergeSection
from edgetune.run import read_manifest
from edgetune.runtime.memory import peak_rss_mb, reset_peak


def check_adapter(adapter: Path) -> dict[str, Any]:
    """Read an adapter folder's configuration.

    Raises:
        InputError: the folder is missing, holds no peft adapter, or its weights are pickled.
    """
    config = adapter / "adapter_config.json"
    if not config.is_file():
        raise InputError(
            "no adapter_config.json: not an adapter folder",
            where=adapter,
            fix="give the folder that `edgetune train` wrote, such as runs/NAME/adapter",
        )
    if not (adapter / "adapter_model.safetensors").is_file():
        pickled = (adapter / "adapter_model.bin").is_file()
        raise InputError(
            "the adapter's weights are pickled, which can run code"
            if pickled
            else "adapter_model.safetensors is missing",
            where=adapter,
            fix="save the adapter with safe_serialization=True",
        )
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(
            f"adapter_config.json is not JSON ({error})", where=adapter, fix="train or copy it again"
        ) from error
    check_safetensors(adapter / "adapter_model.safetensors")
    if not isinstance(found, dict):
        raise InputError("adapter_config.json is not an object", where=adapter, fix="train or copy it again")
    return found


def merge(
    section: MergeSection,
    base: Base,
    adapter: Path,
    rows: Sequence[Sequence[int]],
    *,
    trust_remote_code: bool,
    report: Path,
    merged: Path,
) -> dict[str, Any]:
    """Fold an adapter into its base, save the result, load it again and compare.

    The comparison is of log-probabilities in float32: W·x + s·B(A·x) and (W + s·B·A)·x differ by rounding only,
    around 1e-5 of a logit for each layer, so `section.tolerance` (1e-3 by default) leaves two orders of magnitude
    of room, and is far below the smallest change that a wrong merge makes.

    Args:
        section: the recipe's `merge`.
        base: the base that the adapter was trained on.
        adapter: peft adapter folder. Its chat_template.jinja, if there is one, becomes the merged model's, and the
            `stop_id` of its manifest (the token that ended each answer in training) one of its stop ids.
        rows: token ids of the rows to compare on.
        trust_remote_code: run code that the base brings.
        report: existing folder for report.json.
        merged: existing folder for the merged model: safetensors in float32, tokenizer, chat template, generation config.

    Raises:
        EdgetuneError: the merged model is not base + adapter.
        InputError: the adapter does not fit the base.
    """
    import torch
    from peft import PeftModel

    check_adapter(adapter)
    reset_peak()
    template = adapter / "chat_template.jinja"
    tokenizer = load_tokenizer(
        base.path,
        trust_remote_code=trust_remote_code,
        chat_template=str(template) if template.is_file() else None,
    )
    with progress.task("merge", 5) as bar, quiet():
        model = load_model(base.path, dtype=torch.float32, trust_remote_code=trust_remote_code)
        tied = model.config.tie_word_embeddings
        bar.advance(1, "base loaded")
        try:
            adapted = PeftModel.from_pretrained(model, str(adapter))
        except (ValueError, RuntimeError, KeyError) as error:
            raise InputError(
                f"the adapter does not fit the base: {str(error).splitlines()[0]}",
                where=adapter,
                fix=f"merge it with the base that it was trained on (now: {base.id})",
            ) from error
        moved = _largest_update(adapted)
        wanted = _log_probabilities(adapted, rows)
        bar.advance(1, "adapter applied")
        whole = adapted.merge_and_unload()
        if whole.config.tie_word_embeddings != tied or not _tie_holds(whole):
            raise EdgetuneError(
                "merging broke the tie between embedding and head",
                where=adapter,
                fix="train without an adapter on the embedding or the head",
            )
        whole.config.dtype = torch.float32
        _stop_at(whole, read_manifest(adapter).get("stop_id"))
        whole.save_pretrained(merged, safe_serialization=True)
        tokenizer.save_pretrained(merged)
        _clean(merged, base)
        bar.advance(1, "saved")
        del model, adapted, whole
        again = load_model(merged, dtype=torch.float32, trust_remote_code=trust_remote_code)
        if again.config.tie_word_embeddings != tied or not _tie_holds(again):
            raise EdgetuneError("the saved model lost the tie between embedding and head", where=merged)
        bar.advance(1, "loaded again")
        difference = max(
            float((a - b).abs().max()) for a, b in zip(wanted, _log_probabilities(again, rows), strict=True)
        )
        bar.advance(1, f"difference {difference:.1e}")
    if not difference <= section.tolerance:  # a NaN fails too
        raise EdgetuneError(
            f"the merged model differs from base + adapter by {difference:.2e} in log-probability, over {section.tolerance:.0e}",
            where=adapter,
            fix="raise merge.tolerance only if you know why; please report this adapter's configuration",
        )
    warnings = (
        []
        if moved > 0
        else ["the adapter changes nothing: all of its updates are zero; train longer or with a higher rate"]
    )
    result = {
        "max_logprob_difference": difference,
        "tolerance": section.tolerance,
        "rows": len(rows),
        "tokens": sum(len(row) for row in rows),
        "largest_update": moved,
        "tied_embeddings": bool(tied),
        "dtype": "float32",
        "size_mb": round(sum(f.stat().st_size for f in merged.iterdir()) / 1e6, 1),
        "peak_rss_mb": round(peak_rss_mb(), 1),
        "warnings": warnings,
    }
    write_json(report / "report.json", result)
    return result


def _stop_at(model: Any, stop_id: int | None) -> None:
    known = model.generation_config.eos_token_id
    ids = [] if known is None else known if isinstance(known, list) else [known]
    if stop_id is not None and stop_id not in ids:
        model.generation_config.eos_token_id = [*ids, stop_id] if ids else stop_id


def _log_probabilities(model: Any, rows: Sequence[Sequence[int]]) -> list[Any]:
    import torch

    model.eval()
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([list(row)])).logits[0].float().log_softmax(-1) for row in rows]


def _largest_update(adapted: Any) -> float:
    """Largest absolute entry that the adapter adds to any weight."""
    largest = 0.0
    for module in adapted.modules():
        if hasattr(module, "get_delta_weight"):
            for name in module.active_adapters:
                largest = max(largest, float(module.get_delta_weight(name).abs().max()))
    return largest


def _tie_holds(model: Any) -> bool:
    """Whether embedding and head are one tensor exactly when the configuration says so."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    shared = head is not None and head.weight.data_ptr() == embedding.weight.data_ptr()
    return bool(shared == model.config.tie_word_embeddings)


def _clean(folder: Path, base: Base) -> None:
    """Take paths of this machine out of the saved configuration; keep the base's id."""
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        values = json.loads(path.read_text(encoding="utf-8"))
        for key in ("_name_or_path", "_model_name_or_path", "name_or_path", "is_local", "local_files_only"):
            values.pop(key, None)
        if name == "config.json" and base.source in ("hub", "package"):
            values["_name_or_path"] = base.id
        write_json(path, values)
