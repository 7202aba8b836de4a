"""What is installed, whether it works together, what is missing, and what this machine is.

Neither torch nor transformers is imported. The native runtime is loaded in a process of its own, so
that one that crashes is reported too. Nothing is written, and no network is used.
"""

from __future__ import annotations

import contextlib
import ctypes.util
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from edgetune import __version__
from edgetune.errors import EdgetuneError
from edgetune.files import existing, home
from edgetune.runtime import kernels, providers
from edgetune.runtime.hardware import BUILDS, bandwidth_gb_s, hardware

EXTRAS = ("runtime", "train", "export", "dev")

# Installed together these do not work: name, versions, other's name, its versions, why, what to do.
_BAD_PAIRS = (
    (
        "optimum-onnx",
        "<=0.1.0",
        "transformers",
        ">=4.58",
        "it fails on this transformers",
        "pip uninstall optimum-onnx (edgetune does not use it)",
    ),
    (
        "onnxruntime-genai",
        ">=0.18",
        "transformers",
        "<5.2",
        "its model builder imports classes that only transformers 5.2 and later have",
        "pip install 'edgetune[export]'",
    ),
)
# Not needed, but torch and transformers fail with the wrong one.
_COMPANIONS = ("torchvision", "torchaudio", "optimum", "optimum-onnx", "bitsandbytes", "datasets")

_PROBE = """
import json, os
from edgetune.runtime import genai
import onnxruntime
genai().Model
print(json.dumps({"providers": onnxruntime.get_available_providers(),
                  "telemetry_off": os.environ.get("ORT_DISABLE_TELEMETRY") == "1"}))
"""
_PROBE_S = 60


@dataclass(frozen=True)
class Need:
    """A package that edgetune needs.

    Attributes:
        extra: which installation needs it: runtime, train, export, dev.
        versions: the range that works, as pip writes it.
        installed: its version, None where it is missing.
        fits: whether the version lies in the range; True where it is missing.
    """

    extra: str
    name: str
    versions: str
    installed: str | None
    fits: bool


def examine() -> dict[str, Any]:
    """Look at the installation and at the machine. About two seconds.

    Returns:
        ready for JSON: ok (the runtime works and nothing installed is broken), broken, missing and notes
        (lines for people), edgetune (its version), packages (see `Need`), extras (complete or not), runtime
        (works, providers, telemetry_off), hardware and bandwidth_gb_s (None where a package that measures
        them is missing), providers (see `edgetune.runtime.providers.Status`), kernels (relative
        error of each quantized product, see `edgetune.runtime.kernels`), disk_free_mb (by folder), home, pip.

    Raises:
        EdgetuneError: edgetune itself, or what reads versions, is not installed.
    """
    if importlib.util.find_spec("packaging") is None:
        raise EdgetuneError("the package packaging is missing, which reads versions", fix="pip install packaging")
    needs = [*_needs()]
    runtime, broken = _runtime()
    broken += [*_out_of_range(needs), *_bad_pairs(), *_unmet(needs)]
    machine, bandwidth = _measured()
    writable, pip = _writable(home()), importlib.util.find_spec("pip") is not None
    return {
        "ok": not broken and all(need.installed for need in needs if need.extra == "runtime"),
        "broken": list(dict.fromkeys(broken)),
        "missing": [*_missing(needs)],
        "notes": [*_notes(writable, pip)],
        "edgetune": __version__,
        "packages": [asdict(need) for need in needs],
        "extras": {
            extra: all(need.installed and need.fits for need in needs if need.extra == extra) for extra in EXTRAS
        },
        "runtime": runtime,
        "providers": providers.examine() if runtime["works"] else [],
        "kernels": kernels.errors() if runtime["works"] else {},
        "hardware": machine,
        "bandwidth_gb_s": bandwidth,
        "disk_free_mb": {str(folder): _free_mb(folder) for folder in (home(), Path.cwd())},
        "home": {"path": str(home()), "writable": writable},
        "pip": pip,
    }


def packages_table(report: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows of package, installed version, versions that work, and what needs it."""
    merged: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for need in report["packages"]:
        merged.setdefault(need["name"], (need, []))[1].append(need["extra"])
    own = ("edgetune", report["edgetune"], "", "")
    return [own] + [
        (
            name,
            "missing" if not need["installed"] else need["installed"] + ("" if need["fits"] else " (!)"),
            need["versions"] or "any",
            ", ".join(extra for extra in extras if extra != "dev" or len(extras) == 1),
        )
        for name, (need, extras) in merged.items()
    ]


def machine_table(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of what and value."""
    runtime, bandwidth = report["runtime"], report["bandwidth_gb_s"]
    built_in, writable = ", ".join(runtime["providers"]), report["home"]["writable"]
    return [
        *(_hardware_rows(report["hardware"]) if report["hardware"] else ()),
        ("memory bandwidth", f"{bandwidth:.1f} GB/s read, measured now" if bandwidth else "not measured"),
        *((f"disk at {folder}", f"{free:,} MB free") for folder, free in report["disk_free_mb"].items()),
        ("home", f"{report['home']['path']}{'' if writable else ' (cannot be written)'}"),
        *_kernel_rows(report["kernels"]),
        ("execution providers", built_in or "none: ONNX Runtime does not load"),
        ("onnxruntime-genai", "loads" if runtime["works"] else "does not load"),
        ("telemetry", "off" if runtime["telemetry_off"] else "unknown: ONNX Runtime does not load"),
        *((f"extra {extra}", "complete" if yes else "not complete") for extra, yes in report["extras"].items()),
    ]


def _kernel_rows(found: dict[str, float]) -> list[tuple[str, str]]:
    bad = [f"{name} is wrong by {error:.0%}" for name, error in found.items() if not error <= kernels.MOST_ERROR]
    how = f"NOT RIGHT: {'; '.join(bad)}: use artifacts without it" if bad else f"right: {', '.join(found)}"
    if not bad and kernels.overflows():
        how += " (int8 weights are made uint8 when they are loaded: without VNNI their products overflow)"
    return [("quantized products", how)] if found else []


def _hardware_rows(machine: dict[str, Any]) -> list[tuple[str, str]]:
    cpu, memory = machine["cpu"], machine["memory"]
    cores = f"{cpu['usable_cores']} usable, {cpu['physical_cores']} physical, {cpu['logical_cores']} logical"
    return [
        ("system", f"{machine['os']}, {machine['kernel']}, Python {machine['python']}"),
        ("CPU", f"{cpu['model']} ({cpu['vendor']}, {cpu['architecture']})"),
        ("instruction sets", ", ".join(cpu["instruction_sets"]) or "none of interest"),
        ("cores", cores + (f", governor {machine['governor']}" if machine["governor"] else "")),
        ("load average", ", ".join(map(str, machine["load_average"] or ["not counted"]))),
        ("memory", f"{memory['total_mb']:,} MB, {memory['available_mb']:,} MB available"),
    ]


def remarks(report: dict[str, Any]) -> list[str]:
    """Lines for people: what is broken, what is missing, what is worth knowing, and the verdict."""
    verdict = "the runtime works" if report["ok"] else "not all is well: see the lines above"
    return [
        *(f"broken: {line}" for line in report["broken"]),
        *report["missing"],
        *(f"note: {line}" for line in report["notes"]),
        verdict,
    ]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _build(name: str) -> str:
    """The name under which a package is installed, of those that its builds have; its own where none is."""
    return next((each for each in (name, *BUILDS.get(name, ())) if _version(each)), name)


def _add(extra: str) -> str:
    return "pip install edgetune" if extra == "runtime" else f"pip install 'edgetune[{extra}]'"


def _in(versions: str, version: str) -> bool:
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion

    try:
        return SpecifierSet(versions).contains(version, prereleases=True)
    except InvalidVersion:  # a build of one's own with a name of one's own
        return True


def _needs() -> Iterator[Need]:
    """What edgetune's own metadata asks for, extra by extra."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(line) for line in metadata.requires("edgetune") or []]
    except metadata.PackageNotFoundError as error:
        raise EdgetuneError("edgetune is run without being installed", fix="pip install -e FOLDER") from error
    for extra in EXTRAS:
        for need in wanted:
            base, with_extra = (need.marker is None or need.marker.evaluate({"extra": e}) for e in ("", extra))
            if need.name == "edgetune" or not (base if extra == "runtime" else with_extra and not base):
                continue
            installed = _version(_build(need.name))
            fits = installed is None or _in(str(need.specifier), installed)
            yield Need(extra, need.name, str(need.specifier), installed, fits)


def _missing(needs: Sequence[Need]) -> Iterator[str]:
    for name in dict.fromkeys(need.name for need in needs if not need.installed):
        extras = [need.extra for need in needs if need.name == name]
        used = [extra for extra in extras if extra != "dev"] or extras
        yield f"{name} is missing, for {' and '.join(used)}: {_add(used[0])}"


def _out_of_range(needs: Sequence[Need]) -> Iterator[str]:
    for need in needs:
        if not need.fits and need.extra != "dev":
            yield f"{need.name} {need.installed} is outside {need.versions}: {_add(need.extra)}"


def _bad_pairs() -> Iterator[str]:
    for name, versions, other, other_versions, why, cure in _BAD_PAIRS:
        one, two = _version(_build(name)), _version(_build(other))
        if one and two and _in(versions, one) and _in(other_versions, two):
            yield f"{name} {one} with {other} {two}: {why}: {cure}"
    for name, others in BUILDS.items():
        both = [item for item in (name, *others) if _version(item)]
        if len(both) > 1:
            yield (
                f"{' and '.join(both)} overwrite each other's files: "
                f"pip uninstall {' '.join(both)}, then pip install {both[0]}"
            )


def _unmet(needs: Sequence[Need]) -> Iterator[str]:
    """What the installed packages, and those that they need, ask for and do not find.

    A package that edgetune itself asks for is reported as missing already.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    own = {canonicalize_name(need.name) for need in needs}
    open_ = {need.name for need in needs if need.installed and need.extra != "dev"} | set(_COMPANIONS)
    seen: set[str] = set()
    while open_:
        name = _build(open_.pop())
        seen.add(name)
        version = _version(name)
        for line in (metadata.requires(name) or []) if version else []:
            need = Requirement(line)
            if need.marker and not need.marker.evaluate({"extra": ""}):
                continue
            found = _version(_build(need.name))
            if found is None and canonicalize_name(need.name) in own:
                continue
            if found is None:
                cure = f"pip install '{need.name}{need.specifier}'"
                yield f"{name} {version} needs {need.name}, which is missing: {cure}"
            elif not _in(str(need.specifier), found):
                yield (
                    f"{name} {version} needs {need.name}{need.specifier}, installed is {found}: "
                    f"pip install --upgrade {name} {need.name}"
                )
            elif need.name not in seen:
                open_.add(need.name)


def _runtime() -> tuple[dict[str, Any], list[str]]:
    """Load the native runtime in a process of its own. Returns what it says, and what is broken."""
    failed = {"works": False, "providers": [], "telemetry_off": False}
    try:
        probe = subprocess.run(
            [sys.executable, "-P", "-c", _PROBE],
            capture_output=True,
            text=True,
            check=False,
            timeout=_PROBE_S,
        )
    except subprocess.TimeoutExpired:
        return failed, [f"the runtime does not load within {_PROBE_S} s: {_add('runtime')}"]
    if probe.returncode == 0:
        return {"works": True, **json.loads(probe.stdout.splitlines()[-1])}, []
    why = (probe.stderr.strip().splitlines() or ["no message"])[-1]
    if probe.returncode < 0:
        why = f"it dies with {signal.Signals(-probe.returncode).name}"
        if probe.returncode == -signal.SIGILL:
            why += ", as it needs instructions that this processor lacks"
    return failed, [f"the runtime does not load: {why}: pip install --force-reinstall onnxruntime onnxruntime-genai"]


def _measured() -> tuple[dict[str, Any] | None, float | None]:
    """Hardware and bandwidth, as far as psutil and numpy are there; else they are reported as missing."""
    machine = bandwidth = None
    with contextlib.suppress(ImportError):
        machine = hardware()
        bandwidth = round(bandwidth_gb_s(), 1)
    return machine, bandwidth


def _notes(writable: bool, pip: bool) -> Iterator[str]:
    cuda = _torch_cuda()
    if cuda and not _nvidia_driver():
        yield (
            f"torch is built for CUDA {cuda}, but there is no NVIDIA driver: it computes on the CPU; "
            "torch's CPU build does the same in far less disk space"
        )
    if not pip:
        yield "pip is missing, which fetches packaged models: python -m ensurepip"
    if not writable:
        yield f"{home()} cannot be written: set EDGETUNE_HOME to a folder that can"


def _torch_cuda() -> str | None:
    """The CUDA version that the installed torch was built for, without importing it."""
    found = importlib.util.find_spec("torch")
    if not found or not found.origin:
        return None
    try:
        text = Path(found.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return match[1] if match else None


def _nvidia_driver() -> bool:
    return bool(ctypes.util.find_library("nvcuda" if os.name == "nt" else "cuda")) or Path("/dev/nvidiactl").exists()


def _free_mb(folder: Path) -> int:
    return shutil.disk_usage(existing(folder)).free // 1_000_000


def _writable(folder: Path) -> bool:
    at = existing(folder)
    return at.is_dir() and os.access(at, os.W_OK | os.X_OK)
