"""Merging: what was trained folded into the base in float32, and the proof that nothing else changed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgetune import progress
from edgetune.data.batch import Encoded
from edgetune.errors import EdgetuneError, InputError, first_line
from edgetune.files import read_json, write_json
from edgetune.models import Base, load_model, load_tokenizer
from edgetune.models.check import check_safetensors
from edgetune.models.quiet import quiet
from edgetune.recipe import MergeSection
from edgetune.run import read_manifest
from edgetune.runtime.memory import peak_rss_mb, reset_peak
from edgetune.train import quantize
from edgetune.train.method import QUANTIZATION, link, portable

LOSS_ROWS = 64  # validation rows at most on which qlora's two bases are compared


def is_whole(trained: Path) -> bool:
    """Whether a training's output is a whole model (method full) and no adapter."""
    return not (trained / "adapter_config.json").is_file() and (trained / "config.json").is_file()


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
    validation: Sequence[Encoded] = (),
) -> dict[str, Any]:
    """Fold what was trained into its base, save the result, load it again and compare.

    The comparison is of log-probabilities in float32: W·x + s·B(A·x) and (W + s·B·A)·x differ by rounding only,
    around 1e-5 of a logit for each layer, so `section.tolerance` (1e-3 by default) leaves two orders of magnitude
    of room, and is far below the smallest change that a wrong merge makes.

    A qlora adapter (one with quantization.json) was trained against 4-bit weights. They are made again and proved to be
    the same ones, and the adapter is folded into them as they were multiplied by, unless `section.onto` names the
    full-precision base. The validation loss of both is measured.

    Args:
        section: the recipe's `merge`.
        base: the base that was trained on.
        adapter: peft adapter folder, or a whole trained model, which is passed on. Its chat_template.jinja, if there is
            one, becomes the merged model's, and the `stop_id` of its manifest (the token that ended each answer in
            training) one of its stop ids.
        rows: token ids of the rows to compare on.
        trust_remote_code: run code that the base brings.
        report: existing folder for report.json.
        merged: existing folder for the merged model: safetensors in float32, tokenizer, chat template, generation config.
        validation: rows for qlora's two losses, of which the first 64 are used.

    Raises:
        EdgetuneError: the merged model is not what was trained.
        InputError: the adapter does not fit the base, or `section.onto` has no meaning for it.
    """
    import torch

    whole = is_whole(adapter)
    if not whole:
        check_adapter(adapter)
    quantized = not whole and (adapter / QUANTIZATION).is_file()
    _check_onto(section, adapter, quantized, validation)
    reset_peak()
    template = adapter / "chat_template.jinja"
    tokenizer = load_tokenizer(
        adapter if whole else base.path,
        trust_remote_code=trust_remote_code,
        chat_template=str(template) if template.is_file() else None,
    )
    told: dict[str, Any] = {"method": "full" if whole else "qlora" if quantized else "lora", "warnings": []}
    with progress.task("merge", 5) as bar, quiet():
        if quantized:
            model = _chosen_base(section, base, adapter, rows, validation, trust_remote_code, told)
        else:
            path = adapter if whole else base.path
            model = load_model(path, dtype=torch.float32, trust_remote_code=trust_remote_code)
        tied = model.config.tie_word_embeddings
        bar.advance(1, "base loaded")
        adapted = model if whole else _with_adapter(model, adapter, base)
        moved = _change(model, base, adapter, trust_remote_code) if whole else _largest_update(adapted)
        wanted = _log_probabilities(adapted, rows)
        bar.advance(1, "adapter applied")
        folded = adapted if whole else adapted.merge_and_unload()
        if folded.config.tie_word_embeddings != tied or not _tie_holds(folded):
            raise EdgetuneError(
                "merging broke the tie between embedding and head",
                where=adapter,
                fix="train without an adapter on the embedding or the head",
            )
        _write(folded, adapter if whole else None, read_manifest(adapter).get("stop_id"), merged)
        tokenizer.save_pretrained(merged)
        portable(merged, base)
        bar.advance(1, "saved")
        del model, adapted, folded
        again = load_model(merged, dtype=torch.float32, trust_remote_code=trust_remote_code)
        if again.config.tie_word_embeddings != tied or not _tie_holds(again):
            raise EdgetuneError("the saved model lost the tie between embedding and head", where=merged)
        bar.advance(1, "loaded again")
        difference = _difference(wanted, _log_probabilities(again, rows))["max"]
        bar.advance(1, f"difference {difference:.1e}")
    if not difference <= section.tolerance:  # a NaN fails too
        raise EdgetuneError(
            f"the merged model differs from base + adapter by {difference:.2e} in log-probability, over {section.tolerance:.0e}",
            where=adapter,
            fix="raise merge.tolerance only if you know why; please report this adapter's configuration",
        )
    if moved == 0:
        told["warnings"].append(
            "the adapter changes nothing: all of its updates are zero; train longer or with a higher rate"
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
        **told,
    }
    write_json(report / "report.json", result)
    return result


def _check_onto(section: MergeSection, adapter: Path, quantized: bool, validation: Sequence[Encoded]) -> None:
    if section.onto == "trained":
        return
    if not quantized:
        raise InputError(
            "was not trained against 4-bit weights: it is merged onto the base as it was published anyway",
            where=adapter,
            fix="leave out merge.onto",
        )
    if not validation:
        raise InputError(
            "merging onto another base than was trained against needs rows on which the loss of both is measured",
            where=adapter,
            fix="give examples: --data FILE",
        )


def _chosen_base(
    section: MergeSection,
    base: Base,
    adapter: Path,
    rows: Sequence[Sequence[int]],
    validation: Sequence[Encoded],
    trust_remote_code: bool,
    told: dict[str, Any],
) -> Any:
    """The base that a qlora adapter is merged onto, float32; what was measured of it and of the other goes into `told`."""
    import torch

    other = "full-precision" if section.onto == "trained" else "trained"
    losses: dict[str, float] = {}
    for which in (other, section.onto) if validation else (section.onto,):  # one after the other, for the memory's sake
        if which == "trained":
            model = four_bit_base(base, adapter, rows, section.tolerance, trust_remote_code, told)
        else:
            model = load_model(base.path, dtype=torch.float32, trust_remote_code=trust_remote_code)
        if validation:
            adapted = _with_adapter(model, adapter, base)
            losses[which] = _loss(adapted, validation[:LOSS_ROWS])
            model = adapted.unload()
    told |= {"onto": section.onto, "validation_loss": losses or None}
    if losses and losses[other] < losses[section.onto]:
        told["warnings"].append(
            f"merged onto the {section.onto} weights the validation loss is {losses[section.onto]:.4f}, onto the {other} "
            f"ones it would be {losses[other]:.4f}: merge.onto={other} is better for these rows"
        )
    return model


def four_bit_base(
    base: Base,
    adapter: Path,
    rows: Sequence[Sequence[int]],
    tolerance: float,
    trust_remote_code: bool,
    told: dict[str, Any],
) -> Any:
    """The 4-bit weights that a qlora adapter was trained against, made again, as a float32 model.

    On `rows` they are compared with the 4-bit layers themselves; warnings and what was measured go into `told`.
    """
    import torch

    was = _quantization(adapter)
    dtype = torch.bfloat16 if was["dtype"] == "bfloat16" else torch.float32
    model = quantize.load_quantized(base, dtype, trust_remote_code=trust_remote_code, keep=was["keep"], device="cpu")
    if quantize.fingerprint(model) != was["sha256"]:
        told["warnings"].append(
            "the 4-bit weights made here are not bit for bit those of the training (other hardware, or another "
            "bitsandbytes): compare the merged model's validation loss with the training's"
        )
    in_4_bits = _with_adapter(model, adapter, base)
    ran = _log_probabilities(in_4_bits, rows)
    adapted = _with_adapter(quantize.dequantize(in_4_bits.unload()), adapter, base)
    found = _difference(ran, _log_probabilities(adapted, rows))
    if dtype == torch.float32 and not found["max"] <= tolerance:
        raise EdgetuneError(
            f"the 4-bit weights as float32 differ from the 4-bit layers by {found['max']:.2e} in log-probability",
            where=adapter,
            fix="please report this with the version of bitsandbytes",
        )
    told["as_trained_difference"] = {**found, "computed_in": was["dtype"]}
    return adapted.unload()


def _quantization(adapter: Path) -> dict[str, Any]:
    """What a qlora adapter says of its 4-bit base. Raises InputError where it is not what edgetune writes."""
    told = read_json(adapter / QUANTIZATION)
    wanted = {"type": str, "dtype": str, "keep": list, "sha256": str}
    if not (
        isinstance(told, dict)
        and all(isinstance(told.get(name), kind) for name, kind in wanted.items())
        and told["type"] == "nf4"
        and told["dtype"] in ("bfloat16", "float32")
    ):
        raise InputError(
            "does not say which 4-bit weights the adapter was trained against",
            where=adapter / QUANTIZATION,
            fix="train or copy the adapter again",
        )
    return told


def _with_adapter(model: Any, adapter: Path, base: Base) -> Any:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(adapter))
    except (ValueError, RuntimeError, KeyError) as error:
        raise InputError(
            f"the adapter does not fit the base: {first_line(error)}",
            where=adapter,
            fix=f"merge it with the base that it was trained on (now: {base.id})",
        ) from error


def _write(model: Any, trained: Path | None, stop_id: int | None, out: Path) -> None:
    """Save a model in float32; the weights of one that was trained whole are the training's own files."""
    import torch

    model.config.dtype = torch.float32
    known = model.generation_config.eos_token_id
    ids = [] if known is None else known if isinstance(known, list) else [known]
    if stop_id is not None and stop_id not in ids:
        model.generation_config.eos_token_id = [*ids, stop_id] if ids else stop_id
    if trained is None:
        model.save_pretrained(out, safe_serialization=True)
        return
    for file in [*trained.glob("*.safetensors"), *trained.glob("*.safetensors.index.json")]:
        link(file, out / file.name)
    model.config.save_pretrained(out)
    model.generation_config.save_pretrained(out)


def _log_probabilities(model: Any, rows: Sequence[Sequence[int]]) -> list[Any]:
    import torch

    model.eval()
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([list(row)])).logits[0].float().log_softmax(-1) for row in rows]


def _difference(a: Sequence[Any], b: Sequence[Any]) -> dict[str, float]:
    """Largest (NaN where there is one) and mean difference of log-probabilities, over rows, tokens and vocabulary."""
    import torch

    differences = [(x - y).abs() for x, y in zip(a, b, strict=True)]
    largest = float(torch.stack([d.max() for d in differences]).max()) if differences else 0.0
    count = sum(d.numel() for d in differences)
    return {"max": largest, "mean": sum(float(d.sum()) for d in differences) / max(count, 1)}


def _loss(model: Any, rows: Sequence[Encoded]) -> float:
    """Mean loss, in nats, over the tokens of `rows` that carry loss."""
    import torch

    total, count = 0.0, 0
    for row in rows:
        places = [i for i, learned in enumerate(row.learned[1:]) if learned]
        if places:
            found = _log_probabilities(model, [row.ids])[0][places]
            targets = torch.tensor([row.ids[i + 1] for i in places])
            total -= float(found.gather(1, targets[:, None]).sum())
            count += len(places)
    return total / max(count, 1)


def _largest_update(adapted: Any) -> float:
    """Largest absolute entry that the adapter adds to any weight."""
    from peft.utils import ModulesToSaveWrapper

    largest = 0.0
    for module in adapted.modules():
        if hasattr(module, "get_delta_weight"):
            for name in module.active_adapters:
                weight = module.get_base_layer().weight
                variant = module.lora_variant.get(name)  # DoRA changes the weight's lengths too
                delta = variant.merge_safe(module, name, weight) - weight if variant else module.get_delta_weight(name)
                largest = max(largest, float(delta.abs().max()))
        elif isinstance(module, ModulesToSaveWrapper):
            for name in module.active_adapters:
                kept = dict(module.original_module.named_parameters())
                for part, weight in module.modules_to_save[name].named_parameters():
                    largest = max(largest, float((weight - kept[part]).abs().max()))
    return largest


def _change(model: Any, base: Base, trained: Path, trust_remote_code: bool) -> float | None:
    """Largest absolute change of any weight of a model that was trained whole; None where its base is not known."""
    import torch

    if base.path.resolve() == trained.resolve():
        return None
    before = load_model(base.path, dtype=torch.float32, trust_remote_code=trust_remote_code).state_dict()
    return max(float((weight - before[name]).abs().max()) for name, weight in model.state_dict().items())


def _tie_holds(model: Any) -> bool:
    """Whether embedding and head are one tensor exactly when the configuration says so."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    shared = head is not None and head.weight.data_ptr() == embedding.weight.data_ptr()
    return bool(shared == model.config.tie_word_embeddings)
