"""The ONNX Runtime GenAI model builder: which architectures it knows, running it, and what its log says when it fails."""

from __future__ import annotations

import ast
import contextlib
import functools
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from edgetune import progress
from edgetune.errors import EdgetuneError, InputError
from edgetune.export.targets import Target
from edgetune.files import TMP_PREFIX, home, write_text
from edgetune.runtime.providers import PROVIDERS

_SURE = "LlamaForCausalLM"  # of a list that was read right
# The last line of a traceback.
_RAISED = re.compile(r"^(?:\w+\.)*(\w*(?:Error|Exception|Interrupt))(?:: (.*))?$", re.MULTILINE)
_UNKNOWN = ("is not currently supported", "NotImplementedError")
_NO_MEMORY = ("MemoryError", "DefaultCPUAllocator", "bad_alloc")
_LONGEST = 300  # characters of a cause: ONNX Runtime's name whole signatures
_KILLED = (-9, 137)  # by SIGKILL, which is what a system without memory sends


@functools.cache
def architectures() -> frozenset[str]:
    """The architectures, as `architectures` in config.json has them, that the installed builder knows; empty where that
    cannot be told.

    It has no list: they are what its code compares `config.architectures[0]` with. It is parsed, not imported.
    """
    spec = find_spec("onnxruntime_genai")
    found: set[str] = set()
    for place in (spec.submodule_search_locations or ()) if spec else ():
        with contextlib.suppress(OSError, SyntaxError, ValueError):
            tree = ast.parse((Path(place) / "models" / "builder.py").read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                if isinstance(node, ast.Compare) and _names_architecture(node.left):
                    found.update(
                        part.value
                        for side in node.comparators
                        for part in ast.walk(side)
                        if isinstance(part, ast.Constant) and isinstance(part.value, str)
                    )
    return frozenset(found) if _SURE in found else frozenset()


@functools.cache
def option_words() -> frozenset[str]:
    """What the installed builder's code has in quotes, among it the names of its options; empty where it cannot be read."""
    spec = find_spec("onnxruntime_genai")
    found: set[str] = set()
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for file in (Path(place) / "models").rglob("*.py"):
            with contextlib.suppress(OSError, UnicodeDecodeError):
                found.update(re.findall(r"""["'](\w+)["']""", file.read_text(encoding="utf-8")))
    return frozenset(found) if "prune_lm_head" in found else frozenset()


def _names_architecture(node: ast.expr) -> bool:
    return (
        isinstance(node, ast.Subscript) and isinstance(node.value, ast.Attribute) and node.value.attr == "architectures"
    )


def build(
    model: Path, target: Target, artifact: Path, log: Path, name: str, *, trust_remote_code: bool = False
) -> float:
    """Run the builder in a process of its own.

    Args:
        model: transformers folder, or a quantized checkpoint.
        target: the device profile.
        artifact: existing folder to write to.
        log: file for what the builder says.
        name: the artifact's, by which the log is kept where it fails.
        trust_remote_code: run code that the model's folder brings.

    Returns:
        Its peak memory in MB.

    Raises:
        InputError: it cannot export the model, or disk or memory ran out.
        EdgetuneError: it failed; its log is kept and named.
    """
    layers = json.loads((model / "config.json").read_text(encoding="utf-8")).get("num_hidden_layers", 1)
    total = (
        layers if target.precision in ("fp32", "fp16", "bf16") else 6 * layers + 1
    )  # the builder quantizes about five matrices a layer
    cache = tempfile.TemporaryDirectory(prefix=f"{TMP_PREFIX}builder-", dir=artifact.parent)
    with cache as folder, progress.task("export", total) as bar:
        job = {
            "model": str(model.absolute()),
            "out": str(artifact.absolute()),
            "precision": "fp32" if target.static else target.precision,  # quantized afterwards
            "provider": "cpu" if target.provider == "cpu" else PROVIDERS[target.provider].builder,
            "cache": folder,
            "options": {**target.options, **({"hf_remote": "true"} if trust_remote_code else {})},
        }
        with log.open("wb") as out:
            child = start(job, out)
            done = 0
            try:
                while child.poll() is None:
                    time.sleep(0.25)
                    now = min(_steps(log), total)
                    bar.advance(now - done)
                    done = now
            finally:
                child.kill()  # interrupted: the builder ends with us
                child.communicate()
        bar.advance(total - done)
    text = log.read_text(encoding="utf-8", errors="replace").replace(str(model.absolute()), model.name)
    text = text.replace(str(artifact.absolute()), artifact.name)
    write_text(log, text)
    if child.returncode != 0:
        raise explained(child.returncode, text, target, artifact, name)
    return float(text.rpartition("peak_rss_mb=")[2].split()[0])


def start(job: dict[str, Any], out: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start the builder on a job, which `_builder.main` describes; what it says goes to `out`."""
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "edgetune.export._builder", json.dumps(job)],
        stdin=subprocess.PIPE,  # closed when this process dies, which the builder notices
        stdout=out,
        stderr=subprocess.STDOUT,
    )


def _steps(log: Path) -> int:
    with contextlib.suppress(OSError):
        text = log.read_bytes()
        return text.count(b"Reading layer") + text.count(b"complete quantization")
    return 0


def explained(code: int, log: str, target: Target, artifact: Path, name: str) -> EdgetuneError:
    """What went wrong in the builder.

    Args:
        code: its exit code; negative for a signal.
        log: what it said.
        target: what it built for.
        artifact: the folder that it wrote to.
        name: the artifact's. The log of a failure that is not understood is kept in `home()/logs/` under it.
    """
    if "No space left on device" in log or shutil.disk_usage(artifact.parent).free < 1_000_000:
        return InputError(
            "the disk filled up while exporting; nothing was left half-written",
            fix="free some space and run it again",
        )
    cause = _cause(code, log)
    if code in _KILLED or any(words in cause for words in _NO_MEMORY):
        return InputError(
            "there was too little memory for the model builder; nothing was left half-written",
            where="export",
            fix="close other programs, use a machine with more memory, or a target that holds a layer at a time: "
            "cpu-int4, cpu-int8",
        )
    if any(words in cause for words in _UNKNOWN):
        return InputError(
            f"the model builder cannot export this model: {cause}",
            where="export",
            fix="choose a model of a supported architecture",
        )
    kept = home() / "logs" / ("builder-" + re.sub(r"[^\w.-]+", "-", name) + ".log")
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_text(kept, log)
    return EdgetuneError(
        f"the model builder failed: {cause}",
        where=f"export, {target.precision} on {target.provider}",
        fix=f"check the target's options; what the builder said is in {kept}",
    )


def _cause(code: int, log: str) -> str:
    """One line: the error that ended the builder, else how it ended and its last words."""
    if raised := list(_RAISED.finditer(log)):
        kind, words = raised[-1].groups()
        return f"{kind}: {words}"[:_LONGEST] if words else kind
    lines = [line.strip() for line in log.replace("\r", "\n").splitlines() if line.strip()]
    ended = f"signal {-code}" if code < 0 else f"exit {code}"
    return f"{lines[-1][:_LONGEST] if lines else 'it said nothing'} ({ended})"
