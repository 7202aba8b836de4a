"""What runs on the device: artifacts, sessions, generation, the benchmark.

Never imports torch, transformers or peft. Nothing native is imported before telemetry is switched off.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgetune.runtime.session import Session

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


def load(path: str | Path, threads: int | None = None, *, use_profile: bool = True) -> Session:
    """Verify an artifact's folder and load it.

    Args:
        path: the artifact, or the run folder that holds it.
        threads: CPU threads; the device profile's, or all cores, when None.
        use_profile: run it with the settings that `edgetune tune` measured on this machine, where it did.

    Raises:
        InputError: it is no artifact, or a file of it is missing or changed.
        EdgetuneError: ONNX Runtime cannot load it, or it does not keep the chat contract.
    """
    from edgetune.runtime.artifact import open_artifact
    from edgetune.runtime.session import Session

    return Session(open_artifact(Path(path)), threads=threads, use_profile=use_profile)
