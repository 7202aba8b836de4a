"""What is sure to fail in an export, refused before any work: before a run trains, and before an export quantizes."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from edgetune.errors import InputError
from edgetune.export import kv_cache, qdq
from edgetune.export.builder import architectures, option_words
from edgetune.export.needs import needs, require_room
from edgetune.export.plain.kinds import task_of
from edgetune.export.quantize import calibrate, heal
from edgetune.export.quantize.plan import EMBEDDING, HEAD, Plan, part_names
from edgetune.export.quantize.weights import skeleton
from edgetune.export.quantized import check_kernels, require_examples
from edgetune.export.source_check import check_source, check_ties
from edgetune.export.targets import Target, require_fit, status_of
from edgetune.files import read_json
from edgetune.models import context_length, load_tokenizer, stop_ids
from edgetune.runtime.hardware import total_memory

_FLOAT16 = 65504.0  # its largest number
# What targets call a decoder's matrices; a model may have others, and not all of these.
_USUAL = frozenset(
    ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj", HEAD)
)


def preflight(
    model: Path,
    target: Target,
    max_length: int,
    place: Path,
    *,
    steps: int = 0,
    before_training: bool = False,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Refuse a model that this target cannot have, or that this machine cannot export.

    Args:
        model: transformers folder: the one that is exported, or the base of what will be.
        target: the device profile.
        max_length: context of the artifact in tokens.
        place: a folder on the disk that the artifact is written to.
        steps: of healing.
        before_training: the model is a base. transformers will load it and write it anew, so names and shapes are its
            business; its numbers are met by the training; memory that is used now is not used then.
        chat_template: a file that takes the place of the model's own template.
        trust_remote_code: run code that the folder brings.

    Raises:
        InputError: the model builder does not know the architecture or an option of the target, heads or matrices do not fit the target, the context
            does not fit its fixed shapes, nothing says how long it is or which tokens end an answer, tokenizer or chat
            template are missing, config.json contradicts the weights, this processor computes the target's products wrong,
            or there is too little memory or disk.
    """
    built = skeleton(model, trust_remote_code=trust_remote_code)
    _require_known(model, built, before_training)
    require_fit(target, model)
    _require_names(built, target)
    limit = min(max_length, context_length(model))
    if target.static:
        qdq.require_context(target.static, limit)
    stop_ids(model)
    _require_chat(model, chat_template, before_training, trust_remote_code)
    if target.quantization:
        _require_blocks(built, target.quantization.plan())
        if target.provider == "cpu" and status_of(target).runs:
            check_kernels(target.quantization)
    found = needs(model, target, steps=steps)
    if before_training:  # then the merged model lies on the disk, too
        require_room(found, place, memory=total_memory(), before=4 * found.parameters)
    else:
        require_room(found, place)
    check_ties(model, built.config)
    if not before_training:
        check_source(model, built, _FLOAT16 if target.precision == "fp16" else math.inf)


def require_room_for(model: Path, target: Target, out: Path, *, steps: int = 0) -> None:
    """Raise InputError where there is too little memory or disk, by the headers of a decoder's folder, before its files are
    hashed. What is no such folder, or broken, is left to those who read it."""
    try:
        if not (model / "config.json").is_file() or task_of(model) is not None:
            return
        found = needs(model, target, steps=steps)
    except InputError:
        return
    require_room(found, out)


def require_rows(target: Target, steps: int, rows: int, tokens: int, *, where: str = "data.train") -> None:
    """Refuse rows that are too few to calibrate or to heal on.

    Args:
        target: the device profile.
        steps: of healing.
        rows: how many there are.
        tokens: of all of them.
        where: their place.

    Raises:
        InputError: too few.
    """
    if target.calibrates:
        require_examples(rows)
    if target.static:
        qdq.require_tokens(tokens, where)
    if target.kv_cache == "int8":
        kv_cache.require_tokens(tokens, where)
    if target.quantization is None:
        return
    if target.quantization.plan().calibrated:
        calibrate.require_tokens(tokens, where)
    if steps:
        heal.require_rows(rows, tokens, where)


def _require_chat(model: Path, chat_template: str | None, before_training: bool, trust_remote_code: bool) -> None:
    """A tokenizer that ONNX Runtime GenAI can read, and a template, without which there is no chat contract."""
    tokenizer: Any = load_tokenizer(model, trust_remote_code=trust_remote_code, chat_template=chat_template)
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            "the model has no fast tokenizer (tokenizer.json), which ONNX Runtime GenAI reads",
            where=model,
            fix="copy tokenizer.json from the model that this one was made from",
        )
    if not tokenizer.chat_template:
        raise InputError(
            "the model has no chat template, which every artifact needs",
            where=model,
            fix="give one: model.chat_template=FILE.jinja"
            if before_training
            else "put one into the model's folder, or a copy of it, as chat_template.jinja",
        )


def _require_known(model: Path, built: Any, before_training: bool) -> None:
    known, config = architectures(), model / "config.json"
    named = [type(built).__name__] if before_training else read_json(config).get("architectures")
    if not isinstance(named, list) or not named:
        raise InputError(
            "names no architecture, by which the model builder knows a model",
            where=config,
            fix=f'add "architectures": ["{type(built).__name__}"]',
        )
    if known and named[0] not in known:
        families = sorted(name.removesuffix("ForCausalLM") for name in known if name.endswith("ForCausalLM"))
        raise InputError(
            f"the installed ONNX Runtime GenAI's model builder does not know the architecture {named[0]}",
            where=config,
            fix=f"choose a model of one that it knows ({', '.join(families)}), or a newer onnxruntime-genai",
        )


def _require_blocks(built: Any, plan: Plan) -> None:
    """Each matrix that is quantized must be cut into blocks evenly."""
    calibrate.decoder_layers(built)
    columns = built.get_input_embeddings().weight.shape[1]
    found = [(HEAD if built.config.get_text_config().tie_word_embeddings else EMBEDDING, columns), *_matrices(built)]
    for name, width in found:
        calibrate.fitted(name, plan.grid(name), width)


def _matrices(built: Any) -> list[tuple[str, int]]:
    """Name and columns of each matrix of the layers and of the head; those of a fused one's parts."""
    import torch

    found = [(HEAD, built.get_input_embeddings().weight.shape[1])]
    for path, linear in built.named_modules():
        if isinstance(linear, torch.nn.Linear) and ".layers." in path:
            found += [(part, linear.in_features) for part in part_names(path)]
    return found


def _require_names(built: Any, target: Target) -> None:
    """The matrices and the builder's options that a target names must exist. Names that targets of edgetune's own have are
    right for other models."""
    given: dict[str, Iterable[str]] = {
        "quantization.modules": target.quantization.modules if target.quantization else {},
        "static.modules": target.static.modules if target.static else {},
    }
    matrices = {name for name, _ in _matrices(built)} | {EMBEDDING}
    known = _USUAL | matrices | {name.rpartition(".")[2] for name in matrices}
    for key, names in given.items():
        _require_known_names(key, "the model has no matrix", names, known)
    if words := option_words():
        _require_known_names("options", "the model builder reads no option", target.options, words)


def _require_known_names(key: str, what: str, names: Iterable[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            fix = f"did you mean `{near[0]}`?" if near else "remove it, or correct its name"
            raise InputError(f"{what} `{name}`", where=f"export.target, {key}", fix=fix)
