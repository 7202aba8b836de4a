"""What the machine does meanwhile: other programs, energy, what makes numbers doubtful."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from edgetune.runtime.bench import watch
from edgetune.runtime.bench.report import noise


def test_noise_is_told():
    entry = {"name": "tg8", "kind": "drawn", "prefill_tokens_per_s": None}
    steady = {"p50": 100, "min": 90, "max": 110}
    quiet = {**entry, "others_busy_cores": 0.2, "decode_tokens_per_s": steady, "frequency_mhz": None, "throttled": None}
    assert noise([quiet], 4) == []
    assert "used 2.0 of 4 cores" in noise([{**quiet, "others_busy_cores": 2.0}], 4)[0]
    uneven = {**quiet, "decode_tokens_per_s": {"p50": 100, "min": 80, "max": 120}}
    assert "differ by 40%" in noise([uneven], 4)[0]
    assert noise([{**quiet, "others_busy_cores": None}], 4) == []
    moved = {**quiet, "frequency_mhz": {"min": 1500.0, "max": 3000.0}}
    assert "1,500 to 3,000 MHz" in noise([moved], 4)[0]
    assert "heat" in noise([{**quiet, "throttled": 3}], 4)[0]


def test_others_are_measured_without_the_process_itself():
    import psutil

    process = psutil.Process()
    own = process.cpu_times()
    busy, start = watch.busy_s([process.pid]), time.perf_counter()
    while time.perf_counter() - start < 0.5:
        sum(range(1000))
    spent = process.cpu_times().user - own.user
    system = watch.busy_s([process.pid]) - busy
    assert spent > 0.1 and system < 0.5 * ((os.cpu_count() or 1) - 1) + 0.5 - spent + 0.3


def test_busy_processes_beside_are_no_disturbance(monkeypatch: pytest.MonkeyPatch):
    asked: list[list[int]] = []
    monkeypatch.setattr(watch, "busy_s", lambda own: float(asked.append(list(own)) or 0))
    meter = watch.Meter([1])
    with meter.round([7, 8]):
        pass
    with meter.round():
        pass
    assert asked == [[1, 7, 8], [1, 7, 8], [1], [1]]


def test_energy_counters_that_begin_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(watch, "_POWERCAP", tmp_path)
    assert watch.energy_uj() is None and watch.joules(None, None) is None
    for name, count in (("intel-rapl:0", 900_000), ("intel-rapl:1", 5_000_000), ("intel-rapl:0:0", 7)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{count}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("1000000\n")
    before = watch.energy_uj()
    assert before and before.keys() == {"intel-rapl:0", "intel-rapl:1"}  # a package's parts are counted in it
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("100000")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("7000000")
    assert watch.joules(before, watch.energy_uj()) == pytest.approx(0.2 + 2.0)
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert watch.joules(before, watch.energy_uj()) is None


def test_fair_share():
    from edgetune.runtime.bench.report import fair_share

    assert fair_share(2, 2, 2) == 0.5 and fair_share(1, 1, 2) == 1 and fair_share(4, 4, 4) == 0.5
    assert fair_share(2, 1, 2) == pytest.approx(2 / 3)
