"""What the runtime has to know of a model, read from its folder."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from edgetune.errors import InputError
from edgetune.files import read_json
from edgetune.models import context_length, stop_ids
from edgetune.runtime.plain.description import SEQ2SEQ, Description, Pooling, Scores, Task

_POOLING_FLAGS: dict[str, Pooling] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
}
_SENTENCE_FILES = ("sentence_bert_config.json", "sentence_roberta_config.json", "sentence_distilbert_config.json")


def describe(folder: Path, task: Task, model: Any, tokenizer: Any, max_length: int, layers: int = 0) -> Description:
    """The description of a model.

    Args:
        folder: transformers folder, with sentence-transformers' files where there are some.
        task: what it does.
        model: it, loaded.
        tokenizer: its tokenizer, loaded.
        max_length: most tokens of a text; capped at what the model was made for.
        layers: of its decoder.

    Raises:
        InputError: its tokenizer has no padding token, or it pools in a way that is not known here.
    """
    sentence: dict[str, Any] = next(
        (read_json(folder / name) for name in _SENTENCE_FILES if (folder / name).is_file()), {}
    )
    context = text_length(folder, model, sentence)
    common: dict[str, Any] = {
        "task": task,
        "max_length": min(max_length, context),
        "pad_id": _pad_id(folder, model, tokenizer),
        "lower_case": bool(sentence.get("do_lower_case", False)),
    }
    if task == SEQ2SEQ:
        return Description(
            **common, inputs=("input_ids", "attention_mask"), **_of_decoder(folder, model, max_length), layers=layers
        )
    names = ["input_ids", "attention_mask"]
    # Models make up what their tokenizer does not give them.
    if "token_type_ids" in tokenizer("a", "b") and "token_type_ids" in inspect.signature(model.forward).parameters:
        names.append("token_type_ids")
    common["inputs"] = tuple(names)
    if task == "feature-extraction":
        pooling, normalize = _pooling(folder)
        return Description(**common, pooling=pooling, normalize=normalize, dimensions=int(model.config.hidden_size))
    if task == "question-answering":
        return Description(**common)
    labels = tuple(str(model.config.id2label[number]) for number in range(model.config.num_labels))
    return Description(**common, labels=labels, scores=_scores(model.config))


def text_length(folder: Path, model: Any, sentence: dict[str, Any]) -> int:
    """Most tokens of a text that the model was made for, those that the tokenizer adds included."""
    positions = context_length(folder)
    for name, module in model.named_modules():
        # RoBERTa's positions begin behind the padding token's.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions -= module.padding_idx + 1
            break
    asked = sentence.get("max_seq_length")
    return min(positions, asked) if isinstance(asked, int) and asked > 0 else positions


def _pad_id(folder: Path, model: Any, tokenizer: Any) -> int:
    for found in (tokenizer.pad_token_id, getattr(model.config, "pad_token_id", None)):
        if isinstance(found, int) and found >= 0:
            return found
    raise InputError("its tokenizer has no padding token", where=folder, fix='add "pad_token" to tokenizer_config.json')


def _pooling(folder: Path) -> tuple[Pooling, bool]:
    """How sentence-transformers' modules make one vector of a text's; the mean, as it is, where there are none."""
    where = folder / "modules.json"
    if not where.is_file():
        return "mean", False
    pooling: Pooling = "mean"
    normalize = False
    for module in read_json(where):
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind == "Pooling":
            pooling = _mode(folder / str(module.get("path", "")) / "config.json")
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise InputError(
                f"its module {kind} is not exported", where=where, fix="give a model of transformer and pooling"
            )
    return pooling, normalize


def _mode(where: Path) -> Pooling:
    config = read_json(where)
    on = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
    known = [_POOLING_FLAGS[name] for name in on if name in _POOLING_FLAGS]
    if (mode := config.get("pooling_mode")) in _POOLING_FLAGS.values():
        return mode
    if len(on) != 1 or not known or config.get("include_prompt") is False:
        said = ", ".join(on) or f"pooling_mode {mode}"
        raise InputError(
            f"pools by {said}, which is not exported", where=where, fix="pool by mean, cls or max, one of them"
        )
    return known[0]


def _scores(config: Any) -> Scores:
    if config.num_labels == 1 or config.problem_type == "regression":
        return "none"
    return "sigmoid" if config.problem_type == "multi_label_classification" else "softmax"


def _of_decoder(folder: Path, model: Any, max_length: int) -> dict[str, Any]:
    generation = model.generation_config
    start = generation.decoder_start_token_id
    start = model.config.decoder_start_token_id if start is None else start
    if not isinstance(start, int):
        what = "neither generation_config.json nor config.json names a `decoder_start_token_id`"
        raise InputError(what, where=folder, fix="add it to generation_config.json")
    never = [words[0] for words in generation.bad_words_ids or [] if len(words) == 1]
    return {
        "start_id": start,
        "first_id": generation.forced_bos_token_id,
        "stop_ids": tuple(stop_ids(folder)),
        "suppressed": tuple(sorted({*never, *(generation.suppress_tokens or [])})),
        "max_answer": min(max_length, context_length(folder)),
    }


def left_aside(model: Any) -> list[str]:
    """What a sequence-to-sequence model's generation_config asks for beyond greedy search, in words; it is not done."""
    generation, found = model.generation_config, []
    for name, plain in (
        ("num_beams", (None, 1)),
        ("no_repeat_ngram_size", (None, 0)),
        ("encoder_no_repeat_ngram_size", (None, 0)),
        ("repetition_penalty", (None, 1.0)),
        ("length_penalty", (None, 1.0)),
        ("min_length", (None, 0)),
        ("min_new_tokens", (None, 0)),
        ("do_sample", (None, False)),
    ):
        if (value := getattr(generation, name, None)) not in plain:
            found.append(f"{name}={value}")
    return found
