"""What runs on the device: artifacts, sessions, generation, the benchmark.

Never imports torch, transformers or peft. Nothing native is imported before telemetry is switched off.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

if TYPE_CHECKING:
    from edgetune.runtime.completion import Completion, Message, Piece
    from edgetune.runtime.options import GenerationOptions
    from edgetune.runtime.plain.encoder import Embedder
    from edgetune.runtime.plain.heads import Answerer, Classifier, Tagger
    from edgetune.runtime.plain.seq2seq import Seq2Seq
    from edgetune.runtime.session import Session

Kind = TypeVar("Kind")

# ONNX Runtime reads this once, when its library is loaded; what the caller's environment says does not count.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

__all__ = [
    "Answerer", "Classifier", "Completion", "Embedder", "GenerationOptions", "Message", "Piece", "Seq2Seq", "Session", "Tagger",
    "genai", "load",
]  # fmt: skip


def genai() -> Any:
    """The module `onnxruntime_genai`, with telemetry and its own logging off. The only place that imports
    it."""
    import onnxruntime_genai

    onnxruntime_genai.disable_telemetry_events()
    onnxruntime_genai.set_log_options(enabled=False)
    return onnxruntime_genai


# What is imported when it is asked for, from where: importing this package stays light.
_LATER = {
    "GenerationOptions": "options",
    "Session": "session",
    "Completion": "completion",
    "Message": "completion",
    "Piece": "completion",
    "Embedder": "plain.encoder",
    "Classifier": "plain.heads",
    "Tagger": "plain.heads",
    "Answerer": "plain.heads",
    "Seq2Seq": "plain.seq2seq",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)


@overload
def load(
    path: str | Path, threads: int | None = None, *, use_profile: bool = True, prompt_cache: str | Path | bool = False
) -> Session: ...


@overload
def load(
    path: str | Path,
    threads: int | None = None,
    *,
    use_profile: bool = True,
    prompt_cache: str | Path | bool = False,
    kind: type[Kind],
) -> Kind: ...


def load(
    path: str | Path,
    threads: int | None = None,
    *,
    use_profile: bool = True,
    prompt_cache: str | Path | bool = False,
    kind: type[Any] | None = None,
) -> Any:
    """Verify an artifact's folder and load it.

    Args:
        path: the artifact, or the run folder that holds it.
        threads: CPU threads; the device profile's, or all cores, when None.
        use_profile: run it with the settings that `edgetune tune` measured on this machine, where it did.
        prompt_cache: keep on disk what a decoder's conversations begin with, their system prompt and tools, and take it up from
            there instead of reading it; in this folder, or in edgetune's own when True.
        kind: what is expected, `Embedder` for example; another artifact is refused. Type checkers take what comes back for
            that, and for a decoder's `Session` where it is not given.

    Returns:
        What the artifact's task asks for: a `Session` of a decoder; of an encoder an `Embedder`, `Classifier`, `Tagger` or
        `Answerer`; a `Seq2Seq`.

    Raises:
        InputError: it is no artifact, a file of it is missing or changed, or it is not what was expected.
        EdgetuneError: ONNX Runtime cannot load it, or its tokenizer or template is not what the model was trained with.
    """
    from edgetune.errors import InputError, from_system_error
    from edgetune.runtime import checks
    from edgetune.runtime.artifact import Artifact, open_any
    from edgetune.runtime.hardware import checked_threads

    if not isinstance(path, str | os.PathLike):
        raise InputError(f"must be the path of a folder, not {checks.shown(path)}", where="path")
    if not isinstance(kind, type | None):
        raise InputError(f"must be a class, such as Embedder, not {checks.shown(kind)}", where="kind")
    checks.flag("use_profile", use_profile)
    if not isinstance(prompt_cache, bool | str | os.PathLike) or "\0" in str(prompt_cache) or prompt_cache == "":
        raise InputError(f"must be a folder, True or False, not {checks.shown(prompt_cache)}", where="prompt_cache")
    threads = None if threads is None else checked_threads(threads)
    try:
        artifact = open_any(Path(path))
    except OSError as error:
        if (known := from_system_error(error)) is None:
            raise
        raise known from error
    wanted: Any
    settings: dict[str, Any]
    if isinstance(artifact, Artifact):
        from edgetune.runtime.session import Session

        folder = prompt_cache if isinstance(prompt_cache, bool) else Path(prompt_cache)
        wanted, settings = Session, {"use_profile": use_profile, "prompt_cache": folder}
    else:
        from edgetune.runtime.plain import class_of

        wanted, settings = class_of(artifact.description.task), {}
        if prompt_cache:
            raise InputError("is for decoders, which read prompts", where="prompt_cache", fix="leave it out")
    if kind is not None and not issubclass(wanted, kind):
        raise InputError(f"gives {wanted.__name__}, not {kind.__name__}", where=path, fix="name another artifact")
    return wanted(artifact, threads, **settings)
