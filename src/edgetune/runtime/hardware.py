"""What this machine is and how fast its memory and its arithmetic are.

Light: no torch, and numpy only where something is measured.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgetune.errors import InputError
from edgetune.runtime import checks

# Instruction sets that decide how fast quantized or half-precision models run.
# Where two names stand, the system's own comes first.
_X86 = (
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
)
_ARM = {
    "neon": "neon",
    "asimd": "neon",
    "asimdhp": "fp16",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
    "sve2": "sve2",
    "sme": "sme",
}
_MACOS = {
    "AdvSIMD": "neon",
    "FEAT_FP16": "fp16",
    "FEAT_DotProd": "dotprod",
    "FEAT_I8MM": "i8mm",
    "FEAT_BF16": "bf16",
    "FEAT_SME": "sme",
    "avx2_0": "avx2",
    "avx512f": "avx512f",
}
_WINDOWS = {
    40: "avx2",
    41: "avx512f",
    19: "neon",
    43: "dotprod",
    46: "sve",
    47: "sve2",
    66: "i8mm",
    68: "bf16",
}
_ARM_VENDORS = {
    "0x41": "ARM",
    "0x42": "Broadcom",
    "0x4e": "NVIDIA",
    "0x51": "Qualcomm",
    "0x61": "Apple",
    "0xc0": "Ampere",
}

# Other builds of a package, which install the same folder under another name.
BUILDS = {
    "onnxruntime": ("onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino"),
    "onnxruntime-genai": ("onnxruntime-genai-cuda", "onnxruntime-genai-directml"),
}
_PACKAGES = (
    "edgetune",
    "onnxruntime",
    "onnxruntime-genai",
    "tokenizers",
    "numpy",
    "torch",
    "transformers",
    "peft",
    "onnx",
    "onnx-ir",
)


def hardware() -> dict[str, Any]:
    """This machine, ready for JSON.

    Returns:
        cpu: model, vendor, architecture, physical_cores, logical_cores, usable_cores (what affinity and the
            container's limit leave to this process; may be a fraction), instruction_sets. Equal from call
            to call.
        governor: frequency governor of the first core, None where the system does not say.
        memory: total_mb and available_mb, container limits taken into account.
        os, kernel, python: their names and versions.
        load_average: see `load_average`.
    """
    total, available = _memory()
    return {
        "cpu": cpu(),
        "governor": _read(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        "memory": {"total_mb": round(total / 1e6), "available_mb": round(available / 1e6)},
        "os": _os_name(),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_average": load_average(),
    }


def architecture() -> str:
    """The processor's, as targets have it: `x86-64`, `arm64`, or what the system calls it."""
    names = {"x86_64": "x86-64", "amd64": "x86-64", "aarch64": "arm64", "arm64": "arm64"}
    return names.get(platform.machine().lower(), platform.machine())


def cpu() -> dict[str, Any]:
    """The processor: the part of `hardware()` that stays the same."""
    import psutil

    logical = psutil.cpu_count() or 1
    model, vendor, flags = _processor()
    return {
        "model": model,
        "vendor": vendor,
        "architecture": platform.machine(),
        "physical_cores": psutil.cpu_count(logical=False) or logical,
        "logical_cores": logical,
        "usable_cores": _usable_cores(logical),
        "instruction_sets": sorted(flags),
    }


def default_threads() -> int:
    """Threads that a session works with when nobody says: the physical cores that this process may use.

    ONNX Runtime's own choice leaves cores idle on some machines (one thread on two virtual cores).
    """
    found = cpu()
    return max(1, min(int(found["physical_cores"]), int(found["usable_cores"])))


def checked_threads(wanted: int | None) -> int:
    """`wanted`, or `default_threads` when None. Raises InputError: below 1, or more than eight a core of this machine."""
    if wanted is None:
        return default_threads()
    most = 8 * int(cpu()["logical_cores"])
    try:
        return checks.whole("threads", wanted, 1, most)
    except InputError:
        what = f"must be 1 to {most} on this machine, not {checks.shown(wanted)}"
        raise InputError(what, where="threads", fix="leave it out for all cores") from None


def load_average() -> list[float] | None:
    """Mean number of running programs in the last 1, 5 and 15 minutes; None on Windows."""
    try:
        return [round(value, 2) for value in os.getloadavg()]
    except (OSError, AttributeError):  # Windows has none
        return None


def versions(*names: str) -> dict[str, str]:
    """Versions of the packages that decide a result, as far as they are installed; nothing is imported.

    Args:
        names: the packages; those that are named here when there are none. Another build of one counts as it.
    """
    from importlib import metadata  # 15 ms that a session without a profile does without

    found: dict[str, str] = {}
    for name in names or _PACKAGES:
        for each in (name, *BUILDS.get(name, ())):
            with contextlib.suppress(metadata.PackageNotFoundError):
                found.setdefault(name, metadata.version(each))
    return found


def bandwidth_gb_s() -> float:
    """Measured read bandwidth of the main memory in GB/s (10^9 bytes), with all usable cores. Under a second.

    Decoding reads every weight once a token, so this bounds its speed. Each core looks for the largest
    number in its slice of one int64 array, four times as large as the last cache: numpy gives the
    interpreter's lock away in that loop, and the loop is faster than memory. A pass reads the array once;
    the median of the passes counts.
    """
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    size = min(max(4 * _cache_bytes(), 64 << 20), 512 << 20, max(_memory()[1] // 4, 1 << 20))
    cores = max(1, int(_usable_cores(os.cpu_count() or 1)))
    slices = np.array_split(np.ones(size // 8, dtype=np.int64), cores)  # ones: pages of zeros may all be one page
    seconds: list[float] = []
    end = time.perf_counter() + 0.4
    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(np.max, slices))  # starts the threads
        while len(seconds) < 3 or (time.perf_counter() < end and len(seconds) < 15):
            start = time.perf_counter()
            list(pool.map(np.max, slices))
            seconds.append(time.perf_counter() - start)
    return size / statistics.median(seconds) / 1e9


def gflops() -> float:
    """Measured float32 matrix multiplication, 10^9 operations a second, with numpy's threads. Under 0.3 s."""
    import numpy as np

    best, end, n = 0.0, time.perf_counter() + 0.2, 256
    while True:
        left, right = np.ones((n, n), dtype=np.float32), np.ones((n, n), dtype=np.float32)
        np.dot(left, right)
        start = time.perf_counter()
        np.dot(left, right)
        took = time.perf_counter() - start
        best = max(best, 2 * n**3 / took / 1e9)
        if n < 2048 and start + took * 18 < end:  # twice the size is eight times the work, done twice
            n *= 2
        elif time.perf_counter() + 2 * took > end:
            return best


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _processor() -> tuple[str, str, set[str]]:
    """Model, vendor, and the instruction sets of interest."""
    if sys.platform == "darwin":
        model = _sysctl("machdep.cpu.brand_string") or platform.processor()
        found = {
            ours
            for theirs, ours in _MACOS.items()
            if _sysctl(f"hw.optional.arm.{theirs}") == "1" or _sysctl(f"hw.optional.{theirs}") == "1"
        }
        return model, _sysctl("machdep.cpu.vendor") or "Apple", found
    if sys.platform == "win32":
        import ctypes

        present = ctypes.windll.kernel32.IsProcessorFeaturePresent
        model = os.environ.get("PROCESSOR_IDENTIFIER", platform.processor())
        found = {name for number, name in _WINDOWS.items() if present(number)}
        return model, model.rsplit(", ", 1)[-1], found
    fields: dict[str, str] = {}
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    board = (_read(Path("/proc/device-tree/model")) or "").rstrip("\0")  # ARM's cpuinfo names no model
    model = fields.get("model name") or board or fields.get("hardware") or platform.machine()
    vendor = fields.get("vendor_id") or _ARM_VENDORS.get(fields.get("cpu implementer", ""), "unknown")
    flags = (fields.get("flags") or fields.get("features") or "").split()
    names = {name: name for name in _X86} if "flags" in fields else _ARM
    return model, vendor, {names[flag] for flag in flags if flag in names}


def _sysctl(name: str) -> str:
    try:
        found = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip()


def _os_name() -> str:
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            return platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    return platform.platform(terse=True)


def _cgroup(v2: str, controller: str, v1: str) -> Iterator[str]:
    """What a limit's file says in this process's control groups and all above them (cgroup v2, and v1)."""
    root = Path("/sys/fs/cgroup")
    for line in (_read(Path("/proc/self/cgroup")) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base, name = (root / controller, v1) if controllers else (root, v2)
        below = base / path.lstrip("/")
        for folder in (below, *below.parents):
            if value := _read(folder / name):
                yield value
            if folder == base:
                break


def _usable_cores(logical: int) -> float:
    cores: float = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical
    for value in _cgroup("cpu.max", "cpu", "cpu.cfs_quota_us"):
        quota, _, period = value.partition(" ")
        if quota.lstrip("-").isdigit() and int(quota) > 0:
            cores = min(cores, int(quota) / int(period or 100_000))
    return int(cores) if cores == int(cores) else round(cores, 2)


def available_memory() -> int:
    """Bytes of memory that programs can still take, container limits taken into account."""
    return _memory()[1]


def total_memory() -> int:
    """Bytes of memory of this machine, or of the container that this program runs in."""
    return _memory()[0]


def _memory() -> tuple[int, int]:
    """Bytes of memory in all, and available, container limits taken into account."""
    import psutil

    memory = psutil.virtual_memory()
    total, available = int(memory.total), int(memory.available)
    limits = [int(value) for value in _cgroup("memory.max", "memory", "memory.limit_in_bytes") if value.isdigit()]
    if limits and min(limits) < total:
        total = min(limits)
        used = [int(value) for value in _cgroup("memory.current", "memory", "memory.usage_in_bytes") if value.isdigit()]
        cached = re.search(
            r"^inactive_file (\d+)$", next(_cgroup("memory.stat", "memory", "memory.stat"), ""), re.MULTILINE
        )
        free = total - (used[0] if used else 0) + (int(cached[1]) if cached else 0)
        available = max(0, min(available, free))
    return total, available


def _cache_bytes() -> int:
    """Size of the last cache; 32 MiB where the system does not say."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = _read(path) or ""
        if text[:-1].isdigit():
            sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}.get(text[-1], 1))
    return max(sizes) or 32 << 20
