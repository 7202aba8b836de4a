"""What the machine says of itself, on this one and on made-up ones."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgetune.runtime import hardware as machine

ARM_CPUINFO = """processor\t: 0
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm crc32 cpuid asimdhp asimddp i8mm bf16 sve
CPU implementer\t: 0x41
CPU part\t: 0xd0b

Revision\t: d04170
"""
X86_CPUINFO = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) N100
flags\t\t: fpu vme sse4_2 avx2 fma avx_vnni hypervisor
bugs\t\t: spectre_v1
"""


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch):
    """Replace the files of the system by those of a test."""

    def use(found: dict[str, str]) -> None:
        monkeypatch.setattr(machine, "_read", lambda path: found.get(str(path)))

    return use


def test_hardware_is_json_with_what_others_rely_on():
    found = json.loads(json.dumps(machine.hardware()))
    assert {"cpu", "governor", "memory", "os", "kernel", "python", "load_average"} == found.keys()
    cpu, memory = found["cpu"], found["memory"]
    assert {"model", "vendor", "architecture", "physical_cores", "logical_cores", "usable_cores"} < cpu.keys()
    assert 0 < cpu["usable_cores"] <= cpu["logical_cores"]
    assert 0 < memory["available_mb"] <= memory["total_mb"]
    assert cpu["instruction_sets"] == sorted(cpu["instruction_sets"])


def test_cpu_is_the_same_every_time():
    assert machine.cpu() == machine.cpu() == machine.hardware()["cpu"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_instruction_sets(files):
    files({"/proc/cpuinfo": X86_CPUINFO})
    assert machine._processor() == ("Intel(R) N100", "GenuineIntel", {"avx2", "fma", "avx_vnni"})
    files({"/proc/cpuinfo": ARM_CPUINFO, "/proc/device-tree/model": "Raspberry Pi 5 Model B\0"})
    sets = {"neon", "fp16", "dotprod", "i8mm", "bf16", "sve"}
    assert machine._processor() == ("Raspberry Pi 5 Model B", "ARM", sets)
    files({})
    assert machine._processor()[2] == set()


@pytest.mark.skipif(sys.platform != "linux", reason="control groups")
def test_container_limits_version_2(files, monkeypatch):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    at = "/sys/fs/cgroup"
    files(
        {
            "/proc/self/cgroup": "0::/a/b",
            f"{at}/a/b/cpu.max": "max 100000",
            f"{at}/a/cpu.max": "150000 100000",
        }
    )
    assert machine._usable_cores(8) == 1.5  # a limit further up holds as well
    files({"/proc/self/cgroup": "0::/", f"{at}/cpu.max": "400000 100000"})
    assert machine._usable_cores(8) == 4
    files(
        {
            "/proc/self/cgroup": "0::/a",
            f"{at}/memory.max": "max",
            f"{at}/a/memory.max": "500000000",
            f"{at}/a/memory.current": "450000000",
            f"{at}/a/memory.stat": "anon 5\ninactive_file 100000000\nactive_file 7",
        }
    )
    assert machine._memory() == (500_000_000, 150_000_000)  # pages of files that nobody uses are free
    files({})
    total, available = machine._memory()
    assert total > available > 0


@pytest.mark.skipif(sys.platform != "linux", reason="control groups")
def test_container_limits_version_1(files, monkeypatch):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    groups = "4:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n0::/"
    at = "/sys/fs/cgroup"
    files(
        {
            "/proc/self/cgroup": groups,
            f"{at}/cpu/cpu.cfs_quota_us": "200000",
            f"{at}/memory/docker/x/memory.limit_in_bytes": "1000000000",
            f"{at}/memory/docker/x/memory.usage_in_bytes": "300000000",
        }
    )
    assert machine._usable_cores(8) == 2
    assert machine._memory() == (1_000_000_000, 700_000_000)
    files({"/proc/self/cgroup": groups, f"{at}/cpu/cpu.cfs_quota_us": "-1"})
    assert machine._usable_cores(8) == 8


def test_bandwidth_and_arithmetic_are_measured():
    assert 0.5 < machine.bandwidth_gb_s() < 5000
    assert 0.1 < machine.gflops() < 100_000


def test_bandwidth_counts_the_bytes_that_are_read(monkeypatch):
    import numpy as np

    read = []
    largest = np.max
    monkeypatch.setattr(machine, "_cache_bytes", lambda: 16 << 20)
    monkeypatch.setattr(machine, "_usable_cores", lambda _: 3)
    monkeypatch.setattr(np, "max", lambda values: (read.append(values.nbytes), largest(values)))
    start = time.perf_counter()
    rate = machine.bandwidth_gb_s()
    wall = time.perf_counter() - start
    assert len(read) % 3 == 0 and sum(read[:3]) == 64 << 20  # three slices are one pass over four caches
    assert rate > (sum(read) - (64 << 20)) / wall / 1e9 * 0.5  # every pass but the first is timed


def test_versions_are_told_without_an_import():
    code = (
        "import sys; from edgetune.runtime.hardware import hardware, versions; hardware(); v = versions(); "
        "assert v['edgetune'] and v['onnxruntime'], v; "
        "assert not {'torch', 'transformers', 'numpy', 'onnxruntime'} & set(sys.modules), 'imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_load_average_where_there_is_none(monkeypatch):
    monkeypatch.delattr(machine.os, "getloadavg", raising=False)
    assert machine.load_average() is None


def test_cache_size_falls_back(monkeypatch):
    monkeypatch.setattr(Path, "glob", lambda *_: iter(()))
    assert machine._cache_bytes() == 32 << 20
