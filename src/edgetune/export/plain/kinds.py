"""What kind of model a folder holds, and which targets it can have."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from edgetune.errors import InputError, need
from edgetune.export.targets import Target
from edgetune.files import read_json
from edgetune.runtime.plain.description import SEQ2SEQ, Task

# How transformers calls the class of a model with such a head, and what loads it.
_HEADS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
}
_BODIES = ("Model", "ForMaskedLM", "ForPreTraining")
LOADERS = {
    "feature-extraction": "AutoModel",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    SEQ2SEQ: "AutoModelForSeq2SeqLM",
}
TARGETS = ("cpu-fp32", "cpu-int8")


def task_of(folder: Path) -> Task | None:
    """The task of an encoder or a sequence-to-sequence model, by its config.json; None for a decoder.

    Raises:
        InputError: it is one of these, but with a head that is not exported.
    """
    config = read_json(folder / "config.json")
    named = config.get("architectures")
    name = str(named[0]) if isinstance(named, list) and named else ""
    head = next((task for suffix, task in _HEADS.items() if name.endswith(suffix)), None)
    if config.get("is_encoder_decoder"):
        if head or not name.endswith(("ForConditionalGeneration", "MTModel")):
            raise _not_exported(folder, name or "of an encoder and a decoder without a name")
        return cast(Task, SEQ2SEQ)
    if head is None and not name.endswith(_BODIES):
        return None
    if not _is_encoder(str(config.get("model_type"))):
        if head is None:
            return None
        raise _not_exported(folder, name)
    return cast(Task, head or "feature-extraction")


def _is_encoder(model_type: str) -> bool:
    need("transformers")
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def _not_exported(folder: Path, name: str) -> InputError:
    return InputError(
        f"the architecture {name} is not exported",
        where=folder / "config.json",
        fix="give a decoder (ForCausalLM), an encoder (Model, ForMaskedLM, "
        + ", ".join(_HEADS)
        + ") or a sequence-to-sequence model (ForConditionalGeneration)",
    )


def require_target(task: Task, target: Target) -> None:
    """Raise InputError unless an encoder or a sequence-to-sequence model can have this target.

    That is the CPU in float32, or with 8-bit weights rounded to nearest in symmetric blocks.
    """
    section, fits = target.quantization, target.provider == "cpu" and target.static is None
    if section is not None:
        grids = section.plan()
        plain = section.method == "min_max" and section.bits == 8 and not grids.grid("q_proj").zero_points
        fits = fits and target.precision == "int8" and plain
    if not fits or (section is None and target.precision != "fp32"):
        raise InputError(
            f"a model for {task} has no such target ({target.precision} on {target.provider}"
            + (f", {section.method}, {section.bits} bits)" if section else ")"),
            where="export.target",
            fix=f"choose one of: {', '.join(TARGETS)}",
        )
