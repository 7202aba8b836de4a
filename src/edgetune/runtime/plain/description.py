"""`model.json` of an artifact: what the runtime has to know of an encoder or a sequence-to-sequence model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from edgetune.errors import InputError

FORMAT = "edgetune/plain/1"
FILE = "model.json"

Task = Literal[
    "feature-extraction", "text-classification", "token-classification", "question-answering", "text2text-generation"
]
Pooling = Literal["mean", "cls", "max"]
Scores = Literal["softmax", "sigmoid", "none"]

TASKS: tuple[str, ...] = get_args(Task)
SEQ2SEQ = "text2text-generation"
ENCODER_GRAPH, DECODER_GRAPH, GRAPH = "encoder.onnx", "decoder.onnx", "model.onnx"
_AGAIN = "export it with this edgetune"


@dataclass(frozen=True)
class Description:
    """What `model.json` says.

    Attributes:
        task: as transformers and optimum name it.
        max_length: tokens of a text, those that the tokenizer adds included.
        inputs: names of the (first) graph's inputs, in order.
        pad_id: the token that fills up shorter texts of a batch.
        lower_case: texts are put into lower case before they are tokenized.
        pooling, normalize, dimensions: of embeddings: how a text's vectors become one, whether it is divided by its length,
            and how many numbers it has.
        labels: of a classification, in the order of the logits.
        scores: how logits become scores: `softmax` where one label holds, `sigmoid` where several may, `none` for numbers
            that are no probabilities.
        layers: of a decoder.
        start_id, first_id: the token that a decoder reads first, and one that its answer must begin with.
        stop_ids, suppressed: tokens that end an answer, and that never come.
        max_answer: most tokens of an answer.
    """

    task: Task
    max_length: int
    inputs: tuple[str, ...]
    pad_id: int
    lower_case: bool = False
    pooling: Pooling = "mean"
    normalize: bool = False
    dimensions: int = 0
    labels: tuple[str, ...] = ()
    scores: Scores = "softmax"
    layers: int = 0
    start_id: int = 0
    first_id: int | None = None
    stop_ids: tuple[int, ...] = ()
    suppressed: tuple[int, ...] = ()
    max_answer: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Ready for `model.json`; what says nothing about the task is left out."""
        known = _ALWAYS | _OF_TASK[self.task]
        return {"format": FORMAT} | {name: value for name, value in asdict(self).items() if name in known}

    @property
    def graphs(self) -> tuple[str, ...]:
        """Names of the graphs' files."""
        return (ENCODER_GRAPH, DECODER_GRAPH) if self.task == SEQ2SEQ else (GRAPH,)


_ALWAYS = {"task", "max_length", "inputs", "pad_id", "lower_case"}
_OF_TASK: dict[str, set[str]] = {
    "feature-extraction": {"pooling", "normalize", "dimensions"},
    "text-classification": {"labels", "scores"},
    "token-classification": {"labels"},
    "question-answering": set(),
    SEQ2SEQ: {"layers", "start_id", "first_id", "stop_ids", "suppressed", "max_answer"},
}


def described(found: Any, where: Path) -> Description:
    """What a `model.json` says.

    Args:
        found: its content.
        where: the file, for messages.

    Raises:
        InputError: it is of another format, incomplete, or has values that cannot be.
    """
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        kind = found.get("format") if isinstance(found, dict) else None
        raise InputError(f"the format is {kind!r}, not {FORMAT!r}", where=where, fix=_AGAIN)
    task = found.get("task")
    if task not in TASKS:
        raise InputError(f"the task {task!r} is unknown", where=where, fix=_AGAIN)
    wanted = _ALWAYS | _OF_TASK[task]
    if missing := sorted(wanted - found.keys()):
        raise InputError(f"lacks {', '.join(missing)}", where=where, fix=_AGAIN)
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value := found[name], list) else value for name in sorted(wanted)
    }
    for name, value in values.items():
        if not _FITS[name](value):
            raise InputError(f"{name} cannot be {value!r}", where=where, fix=_AGAIN)
    return Description(**values)


def _whole(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _all(value: Any, fits: Any) -> bool:
    return isinstance(value, tuple) and all(fits(item) for item in value)


_FITS: dict[str, Any] = {
    "task": lambda value: value in TASKS,
    "max_length": lambda value: _whole(value, 1),
    "inputs": lambda value: bool(value) and _all(value, lambda item: isinstance(item, str)),
    "pad_id": _whole,
    "lower_case": lambda value: isinstance(value, bool),
    "pooling": lambda value: value in get_args(Pooling),
    "normalize": lambda value: isinstance(value, bool),
    "dimensions": lambda value: _whole(value, 1),
    "labels": lambda value: bool(value) and _all(value, lambda item: isinstance(item, str)),
    "scores": lambda value: value in get_args(Scores),
    "layers": lambda value: _whole(value, 1),
    "start_id": _whole,
    "first_id": lambda value: value is None or _whole(value),
    "stop_ids": lambda value: bool(value) and _all(value, _whole),
    "suppressed": lambda value: _all(value, _whole),
    "max_answer": lambda value: _whole(value, 1),
}
