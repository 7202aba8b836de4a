"""Execution providers: which are installed, which find a device, and what to do about those that do not.

A provider is part of an ONNX Runtime build, or comes as a plugin in a package of its own, whose library is
registered in the process: https://onnxruntime.ai/docs/execution-providers/plugin-ep-libraries
A provider that is missing is an error with its cure; the CPU never takes its place unasked.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import io
import json
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.errors import EdgetuneError, InputError, first_line
from edgetune.runtime.native import is_native, off_stdout

if TYPE_CHECKING:
    from collections.abc import Mapping

CPU = "CPUExecutionProvider"
_PROBE_S = 60
# The device that QNN compiles for where none is there: Snapdragon X, whose NPU is of version 73.
_PREPARED_FOR = {"soc_model": "60", "htp_arch": "73"}


@dataclass(frozen=True)
class Provider:
    """Where a provider comes from.

    Attributes:
        ep: ONNX Runtime's name of it.
        genai: ONNX Runtime GenAI's, as it stands in genai_config.json.
        builder: which of the model builder's providers makes its graph.
        install: what to install, for a message.
        plugin: the module of its plugin package, None where it is part of a build.
        device: what it needs, for a message.
        options: its options in genai_config.json where the builder does not write them.
        shares_cache: whether it writes the KV cache into the buffer that it reads it from.
    """

    ep: str
    genai: str
    builder: str
    install: str
    plugin: str | None
    device: str
    options: dict[str, str] | None = None
    shares_cache: bool = True


PROVIDERS = {
    "cuda": Provider(
        "CUDAExecutionProvider",
        "cuda",
        "cuda",
        "pip uninstall onnxruntime onnxruntime-genai, then pip install 'onnxruntime-gpu[cuda,cudnn]' onnxruntime-genai-cuda",
        None,
        "an NVIDIA GPU and its driver",
    ),
    "dml": Provider(
        "DmlExecutionProvider",
        "dml",
        "dml",
        "on Windows: pip uninstall onnxruntime onnxruntime-genai, then "
        "pip install onnxruntime-directml onnxruntime-genai-directml",
        None,
        "Windows and a DirectX 12 GPU",
    ),
    "webgpu": Provider(
        "WebGpuExecutionProvider",
        "webgpu",
        "webgpu",
        "pip install onnxruntime-ep-webgpu",
        "onnxruntime_ep_webgpu",
        "a GPU with a Vulkan, Direct3D 12 or Metal driver",
    ),
    "tensorrt-rtx": Provider(
        "NvTensorRTRTXExecutionProvider",
        "NvTensorRtRtx",
        "NvTensorRtRtx",
        "pip install onnxruntime-ep-nv-tensorrt-rtx",
        "onnxruntime_ep_nv_tensorrt_rtx",
        "an NVIDIA RTX GPU and its driver",
    ),
    "openvino": Provider(
        "OpenVINOExecutionProvider",
        "OpenVINO",
        "cpu",
        "pip install onnxruntime-ep-openvino",
        "onnxruntime_ep_openvino",
        "an Intel processor",
        {"device_type": "CPU", "hint_enable_gqa": "True"},  # without it attention stays with ONNX Runtime
        False,
    ),
    "qnn": Provider(
        "QNNExecutionProvider",
        "QNN",
        "cpu",
        "pip install onnxruntime-qnn",
        "onnxruntime_qnn",
        "a Snapdragon with a Hexagon NPU",
        {"backend_type": "htp"},
    ),
    "vitisai": Provider(
        "VitisAIExecutionProvider",
        "VitisAI",
        "cpu",
        "AMD's build of ONNX Runtime, from AMD's site",
        None,
        "an AMD device with Vitis AI",
        {},
    ),
}


@dataclass(frozen=True)
class Status:
    """How a provider stands on this machine.

    Attributes:
        name: as targets have it: cuda, qnn, …
        installed: its build or its plugin is there, and loads.
        devices: what it finds, such as `GPU NVIDIA`; empty where it finds none.
        prepares: it finds no device, yet can compile graphs for one.
        note: what is wrong, or empty.
        fix: what to do about it.
    """

    name: str
    installed: bool
    devices: tuple[str, ...]
    prepares: bool
    note: str
    fix: str

    @property
    def runs(self) -> bool:
        """Whether graphs can be run on it here."""
        return bool(self.devices)


def status(name: str) -> Status:
    """Load a provider into this process and ask it for its devices. `cpu` is always there."""
    if name == "cpu":
        return Status("cpu", True, ("CPU",), False, "", "")
    provider = PROVIDERS[name]
    import onnxruntime

    built_in = provider.ep in onnxruntime.get_available_providers()
    if not built_in:
        if provider.plugin is None or importlib.util.find_spec(provider.plugin) is None:
            return Status(name, False, (), False, "is not installed", provider.install)
        if why := _register(name):
            return Status(name, False, (), False, f"does not load: {why}", provider.install)
    found = [device for device in onnxruntime.get_ep_devices() if device.ep_name == provider.ep]
    # QNN's build for x86 names the CPU, on which it compiles for the NPU: that is no device to run on.
    kinds = [(device.device.type.name, device.device.vendor) for device in found]
    stands_in = name == "qnn" and not any(kind == "NPU" for kind, _ in kinds)
    devices = () if stands_in else tuple(f"{kind} {vendor}".strip() for kind, vendor in kinds)
    if name == "cuda":
        devices = _nvidia_gpus()
    if devices:
        return Status(name, True, devices, False, "", "")
    note = "finds no device" + (", but can prepare graphs for one" if stands_in and kinds else "")
    return Status(name, True, (), bool(stands_in and kinds), note, f"it needs {provider.device}")


@functools.cache
def _register(name: str) -> str:
    """Make a provider's plugin known to ONNX Runtime, once a process. Returns why that is not possible, or nothing."""
    import onnxruntime

    provider = PROVIDERS[name]
    try:
        with off_stdout():
            onnxruntime.register_execution_provider_library(provider.ep, str(_library(provider)))
    except Exception as error:
        if not (is_native(error) or isinstance(error, OSError | ImportError | AttributeError)):
            raise
        return "" if "already registered" in str(error) else first_line(error)
    return ""


def _nvidia_gpus() -> tuple[str, ...]:
    """NVIDIA GPUs, as their driver names them.

    ONNX Runtime is not asked: its Python module and the library of GenAI are two copies of it, and each loads the provider.
    """
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return ()
    count, name = ctypes.c_int(), ctypes.create_string_buffer(128)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    return tuple(
        name.value.decode("utf-8", "replace")
        for number in range(count.value)
        if driver.cuDeviceGetName(name, len(name), number) == 0
    )


def _library(provider: Provider) -> Path:
    assert provider.plugin is not None
    return Path(importlib.import_module(provider.plugin).get_library_path())


def named(config: dict[str, Any]) -> str:
    """The provider that a genai_config.json asks for, as targets have it; `cpu` where it names none.

    Raises:
        InputError: it names one that edgetune does not know.
    """
    decoder = config.get("model", {}).get("decoder") or {}
    asked = decoder.get("session_options", {}).get("provider_options") or []
    for entry in asked:
        for key in entry:
            for name, provider in PROVIDERS.items():
                if key.lower() == provider.genai.lower():
                    return name
            if key.lower() != "cpu":
                raise InputError(
                    f"asks for the provider {key}, which edgetune does not know",
                    where="genai_config.json",
                    fix=f"edgetune knows cpu, {', '.join(PROVIDERS)}",
                )
    return "cpu"


def require(name: str, where: str | Path | None = None) -> Status:
    """The status of a provider that graphs are about to be run on. Raises InputError, with the cure, where it is missing.

    CUDA's libraries are loaded that lie in Python packages of their own, where the system's loader does not look.
    """
    found = status(name)
    if not found.runs:
        raise InputError(
            f"needs the execution provider {PROVIDERS[name].ep}, which {found.note} here; the CPU does not take its place",
            where=where,
            fix=found.fix + "; or export for this machine: export.target=cpu-int8",
        )
    if name == "cuda":
        import onnxruntime

        with contextlib.redirect_stdout(io.StringIO()):  # what is missing is told by what then fails
            onnxruntime.preload_dlls()
    return found


def register_genai(og: Any, name: str) -> None:
    """Make a provider's plugin known to ONNX Runtime GenAI, which has a list of its own."""
    provider = PROVIDERS.get(name)
    if provider and provider.plugin and importlib.util.find_spec(provider.plugin) is not None:
        try:
            with off_stdout():
                og.register_execution_provider_library(provider.ep, str(_library(provider)))
        except RuntimeError as error:
            if "already registered" not in str(error):
                raise EdgetuneError(f"the plugin {provider.plugin} does not load: {first_line(error)}") from error


def open_session(
    file: Path,
    name: str = "cpu",
    threads: int | None = None,
    model: bytes | None = None,
    session_options: Mapping[str, str] | None = None,
) -> Any:
    """A session of ONNX Runtime on a provider, which keeps what `shares` tells of.

    Args:
        file: the graph.
        name: the provider, as targets have it.
        threads: of the CPU.
        model: a graph in place of what the file holds; its weights lie beside the file.
        session_options: further ones of ONNX Runtime.

    Raises:
        InputError: the provider is missing, finds no device, or takes no node of the graph.
    """
    require(name, file.parent.name)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(file.parent))
    for key, value in (session_options or {}).items():
        options.add_session_config_entry(key, value)
    if threads:
        options.intra_op_num_threads = threads
    source = model or str(file)
    if name == "cpu":
        return onnxruntime.InferenceSession(source, options, providers=[CPU])
    provider = PROVIDERS[name]
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == provider.ep]
    chosen: dict[str, Any] = {}
    if devices:
        options.add_provider_for_devices(devices[:1], provider.options or {})
    else:
        chosen = {"providers": [(provider.ep, provider.options or {}), CPU]}
    with off_stdout():
        session = onnxruntime.InferenceSession(source, options, enable_fallback=0, **chosen)
    if not shares(session).get(provider.ep):
        raise InputError(
            f"{provider.ep} takes no node of the graph; the CPU does not take its place",
            where=file,
            fix="export it for this provider, or for this machine: export.target=cpu-int8"
            + (
                "; its CUDA libraries may be missing: pip install 'onnxruntime-gpu[cuda,cudnn]'"
                if name == "cuda"
                else ""
            ),
        )
    return session


def prepare(file: Path, name: str, out: Path) -> dict[str, float]:
    """Compile a graph for a device that is not here, as far as the provider can do that.

    Args:
        file: the graph.
        name: a provider whose status says `prepares`.
        out: file for the compiled graph.

    Returns:
        See `shares`: what the provider would not take stays with the CPU.

    Raises:
        EdgetuneError: the provider cannot compile it.
    """
    import onnxruntime

    provider = PROVIDERS[name]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    for key, value in {"enable": "1", "file_path": str(out), "embed_mode": "1"}.items():
        options.add_session_config_entry(f"ep.context_{key}", value)
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == provider.ep]
    try:
        options.add_provider_for_devices(devices[:1], {**(provider.options or {}), **_PREPARED_FOR})
        with off_stdout():
            return shares(onnxruntime.InferenceSession(str(file), options))
    except Exception as error:
        if is_native(error):
            raise EdgetuneError(
                f"{provider.ep} cannot compile the graph: {first_line(error)}", where=file.name
            ) from error
        raise


def shares(*sessions: Any) -> dict[str, float]:
    """The share of the sessions' nodes that each provider runs, largest first; they add up to 1.

    Args:
        sessions: of `open_session`.
    """
    counts: Counter[str] = Counter()
    for session in sessions:
        for part in session.get_provider_graph_assignment_info():
            counts[part.ep_name] += len(part.get_nodes())
    whole = sum(counts.values()) or 1
    return {name: round(count / whole, 4) for name, count in counts.most_common()}


def examine() -> list[dict[str, Any]]:
    """Every provider's status, each plugin in a process of its own, as one that crashes is to be told of, too."""
    built_in = [name for name, provider in PROVIDERS.items() if provider.plugin is None]
    found = {entry["name"]: entry for entry in _probe(built_in)}
    for name, provider in PROVIDERS.items():
        if provider.plugin and importlib.util.find_spec(provider.plugin) is None:
            found[name] = asdict(Status(name, False, (), False, "is not installed", provider.install))
        elif provider.plugin:
            found[name] = _probe([name])[0]
    return [found[name] for name in PROVIDERS]


def _probe(names: list[str]) -> list[dict[str, Any]]:
    ask = f"from edgetune.runtime.providers import tell; tell(*{names!r})"
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", ask], capture_output=True, text=True, check=False, timeout=_PROBE_S
        )
    except subprocess.TimeoutExpired:
        why = f"does not load within {_PROBE_S} s"
    else:
        if done.returncode == 0:
            return list(json.loads(done.stdout.splitlines()[-1]))
        why = "does not load: " + (done.stderr.strip().splitlines() or ["no message"])[-1]
        if done.returncode < 0:
            why = f"does not load: it dies with {signal.Signals(-done.returncode).name}"
    return [asdict(Status(name, False, (), False, why, PROVIDERS[name].install)) for name in names]


def tell(*names: str) -> None:
    """Print the status of providers as one line of JSON: what `examine` asks a process of its own for."""
    print(json.dumps([asdict(status(name)) for name in names]))


def table(found: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Rows of provider, how it stands here, and what to do, for people; from `examine`."""
    return [
        (entry["name"], ", ".join(entry["devices"]) or entry["note"], "" if entry["devices"] else entry["fix"])
        for entry in found
    ]
