"""Environments of their own for the other runtimes of `runtime_vs.py`: made once, in edgetune's cache folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from edgetune.files import home
from edgetune.runtime.hardware import cpu

LLAMA = "llama-cpp-python==0.3.36"
OPENVINO = ("openvino-genai==2026.4.0.0", "openvino==2026.4.0")  # a later openvino has another name for its library
# -march=native with a compiler that knows AMX made a library that ends in a general protection fault.
_WITHOUT_AMX = {
    "GGML_AVX": (),
    "GGML_AVX2": ("avx2",),
    "GGML_FMA": ("fma",),
    "GGML_F16C": ("f16c",),
    "GGML_BMI2": ("avx2",),
    "GGML_AVX512": ("avx512f",),
    "GGML_AVX512_VBMI": ("avx512_vnni",),
    "GGML_AVX512_VNNI": ("avx512_vnni",),
    "GGML_AVX512_BF16": ("avx512_bf16",),
    "GGML_AVX_VNNI": ("avx_vnni",),
}


def cmake_flags(sets: set[str]) -> str:
    """How llama.cpp is built for a processor with these instruction sets."""
    flags = ["-DLLAVA_BUILD=OFF"]
    if not any(name.startswith("amx") for name in sets):
        return " ".join([*flags, "-DGGML_NATIVE=ON"])
    flags.append("-DGGML_NATIVE=OFF")
    return " ".join(flags + [f"-D{flag}=ON" for flag, needs in _WITHOUT_AMX.items() if sets.issuperset(needs)])


def llama_python(given: Path | None) -> Path | None:
    """The Python that has llama-cpp-python: the given one, or that of an environment made here. None: not to be had."""
    flags = cmake_flags(set(cpu()["instruction_sets"]))
    # What pip keeps of an earlier build may be of other flags.
    packages = ["--no-cache-dir", "--no-binary", "llama-cpp-python", LLAMA]
    return given or _made("llama.cpp", packages, {"CMAKE_ARGS": flags}, f"built from source ({flags}): 5 to 15 minutes")


def openvino_python(given: Path | None) -> Path | None:
    """The Python that has OpenVINO GenAI, likewise."""
    return given or _made("OpenVINO GenAI", list(OPENVINO), {}, "a minute")


def _made(engine: str, packages: list[str], environment: dict[str, str], takes: str) -> Path | None:
    name = packages[-1] if "--no-binary" in packages else packages[0]
    folder = home() / "benchmarks" / f"{name.replace('==', '-')}-py{sys.version_info[0]}.{sys.version_info[1]}"
    python, ready, log = folder / "bin" / "python", folder / "ready", folder.parent / f"{folder.name}.log"
    if ready.is_file():
        return python
    _say(f"making an environment for {engine} in {folder} ({takes})")
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with log.open("wb") as out:
        for command in (
            [sys.executable, "-m", "venv", str(folder)],
            [str(python), "-m", "pip", "install", "--disable-pip-version-check", *packages],
        ):
            if subprocess.run(command, stdout=out, stderr=out, env={**os.environ, **environment}).returncode:
                _say(f"{engine} is left out: it cannot be installed here ({log})")
                return None
    _say(f"made in {time.monotonic() - start:.0f} s")
    ready.touch()
    return python


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)
