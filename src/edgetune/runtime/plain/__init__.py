"""What runs on plain ONNX Runtime: encoders and sequence-to-sequence models, with `tokenizers` in front.

`edgetune.runtime.load` gives an object for the artifact's task: `Embedder`, `Classifier`, `Tagger`, `Answerer` or
`Seq2Seq`. Decoders are `runtime.session.Session`'s.
"""

from __future__ import annotations

from typing import Any


def class_of(task: str) -> Any:
    """The class of an artifact for this task, one of `description.TASKS`."""
    from edgetune.runtime.plain import encoder, heads, seq2seq

    return {
        "feature-extraction": encoder.Embedder,
        "text-classification": heads.Classifier,
        "token-classification": heads.Tagger,
        "question-answering": heads.Answerer,
        "text2text-generation": seq2seq.Seq2Seq,
    }[task]
