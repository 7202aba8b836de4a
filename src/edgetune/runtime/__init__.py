"""What runs on the device: artifacts, sessions, generation, the benchmark.

Never imports torch, transformers or peft. Nothing native is imported before telemetry is switched off.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar, overload

Kind = TypeVar("Kind")

# ONNX Runtime reads this once, when its library is loaded; what the caller's environment says does not count.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

__all__ = ["genai", "load"]


def genai() -> Any:
    """The module `onnxruntime_genai`, with telemetry and its own logging off. The only place that imports
    it."""
    import onnxruntime_genai

    onnxruntime_genai.disable_telemetry_events()
    onnxruntime_genai.set_log_options(enabled=False)
    return onnxruntime_genai


@overload
def load(path: str | Path, threads: int | None = None, *, use_profile: bool = True) -> Any: ...


@overload
def load(path: str | Path, threads: int | None = None, *, use_profile: bool = True, kind: type[Kind]) -> Kind: ...


def load(
    path: str | Path, threads: int | None = None, *, use_profile: bool = True, kind: type[Any] | None = None
) -> Any:
    """Verify an artifact's folder and load it.

    Args:
        path: the artifact, or the run folder that holds it.
        threads: CPU threads; the device profile's, or all cores, when None.
        use_profile: run it with the settings that `edgetune tune` measured on this machine, where it did.
        kind: what is expected; type checkers then know what comes back.

    Returns:
        What its task asks for: a `session.Session` of a decoder; of an encoder a `plain.encoder.Embedder`, or a
        `Classifier`, `Tagger` or `Answerer` of `plain.heads`; a `plain.seq2seq.Seq2Seq`.

    Raises:
        InputError: it is no artifact, a file of it is missing or changed, or it is not what was expected.
        EdgetuneError: ONNX Runtime cannot load it, or its tokenizer or template is not what the model was trained with.
    """
    from edgetune.errors import InputError
    from edgetune.runtime.artifact import Artifact, open_any

    artifact = open_any(Path(path))
    wanted: Any
    settings: dict[str, bool]
    if isinstance(artifact, Artifact):
        from edgetune.runtime.session import Session

        wanted, settings = Session, {"use_profile": use_profile}
    else:
        from edgetune.runtime.plain import class_of

        wanted, settings = class_of(artifact.description.task), {}
    if kind is not None and not issubclass(wanted, kind):
        raise InputError(f"gives {wanted.__name__}, not {kind.__name__}", where=path, fix="name another artifact")
    return wanted(artifact, threads, **settings)
