"""The measuring process: how it dies, what runs beside it, what it imports."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest

from artifacts import copy_of, known_bandwidth, seal, tiny_artifact  # noqa: F401
from edgetune.errors import EdgetuneError, InputError
from edgetune.recipe import BenchOptions, BenchSection
from edgetune.runtime.bench import process as module
from edgetune.runtime.bench import watch
from edgetune.runtime.bench.measure import bench
from edgetune.runtime.bench.report import schema
from edgetune.runtime.bench.text import table

SECTION = BenchSection(prompt_tokens=100, new_tokens=12, warmup=1, repetitions=4)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch):
    """Put a script in the worker's place."""

    def use(code: str) -> None:
        monkeypatch.setattr(module, "_COMMAND", (sys.executable, "-c", code))

    return use


def test_graph_that_does_not_load(tiny_artifact: Path, tmp_path: Path):  # noqa: F811
    copy = copy_of(tiny_artifact, tmp_path)
    (copy / "model.onnx").write_bytes(b"not a graph")
    seal(copy)
    with pytest.raises(EdgetuneError) as caught:
        bench(copy, SECTION)
    assert "ONNX Runtime cannot load the artifact" in caught.value.text() and caught.value.exit_code == 1


def test_crash_shows_the_end_of_what_the_worker_said(worker):
    worker("import sys; [print('line', n, file=sys.stderr) for n in range(50)]; sys.exit(7)")
    with pytest.raises(EdgetuneError) as caught:
        bench(Path("any"), SECTION)
    text = caught.value.text()
    assert "exit code 7" in text and "line 49" in text and "line 1\n" not in text and caught.value.exit_code == 1


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_killed_for_memory(worker, tmp_path: Path):
    worker("import os; os.kill(os.getpid(), 9)")
    with pytest.raises(EdgetuneError, match="SIGKILL, as the system does when memory runs out"):
        bench(Path("any"), SECTION, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_interrupt_ends_the_worker(worker, tmp_path: Path):
    code = "import os, time, pathlib; pathlib.Path({!r}).write_text(str(os.getpid())); time.sleep(600)"
    pid_file = tmp_path / "pid"
    script = (
        "import sys; from pathlib import Path\n"
        "from edgetune.runtime.bench import measure, process; from edgetune.recipe import BenchSection\n"
        f"process._COMMAND = (sys.executable, '-c', {code.format(str(pid_file))!r})\n"
        "measure.bench(Path('any'), BenchSection())"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE)
    end = time.monotonic() + 30
    while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    parent.send_signal(signal.SIGINT)
    parent.communicate(timeout=30)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


def test_batch_answers_as_single_rows_do(tiny_artifact: Path):  # noqa: F811
    from edgetune.runtime.bench.process import Job, run_job
    from edgetune.runtime.bench.workloads import Workload

    _, single = run_job(Job(tiny_artifact, threads=1), Workload("drawn", 40, 8), 0, 2)
    facts, both = run_job(
        Job(tiny_artifact, threads=1, session_options={"intra_op_num_threads": 1}),
        Workload("drawn", 40, 8, batch=2),
        0,
        1,
    )
    assert facts["provider"] == "cpu" and facts["threads"] == 1
    assert both[0][0]["tokens"] == [part[0]["tokens"] for part in single]


def test_stress_runs_beside_and_ends(tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    import psutil

    monkeypatch.setattr(watch, "_POWERCAP", tmp_path)
    (tmp_path / "intel-rapl:0").mkdir()
    for name in ("energy_uj", "max_energy_range_uj"):
        (tmp_path / "intel-rapl:0" / name).write_text("1000")
    section = BenchSection(prompt_tokens=10, new_tokens=4, warmup=0, repetitions=2)
    report = bench(tiny_artifact, section, None, BenchOptions(stress=1, loads=0))
    assert report["stress"]["processes"] == 1 and 0 < report["stress"]["fair_share"] <= 1
    assert report["workloads"][0]["quiet"]["decode_tokens_per_s"]["n"] == 2
    assert report["energy_j"] == 0  # a counter that stands still was read
    assert "beside 1 busy process" in dict(table(report))["under stress"]
    jsonschema.validate(report, schema(), cls=jsonschema.Draft202012Validator)
    with module.stress(2) as pids:
        time.sleep(0.3)
        assert all(psutil.Process(pid).cpu_times().user > 0 for pid in pids)
    assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_busy_processes_end_with_a_parent_that_is_killed(tmp_path: Path):
    code = (
        "from edgetune.runtime.bench.process import stress\n"
        "with stress(1) as pids: print(pids[0], flush=True); import time; time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    end = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and "Z" not in _state(pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert _state(pid) in ("", "Z")


def _state(pid: int) -> str:
    import psutil

    try:
        return {"zombie": "Z"}.get(psutil.Process(pid).status(), "alive")
    except psutil.Error:
        return ""


def test_a_conversation_beside_busy_processes_finds_nothing_in_the_cache(tiny_artifact: Path):  # noqa: F811
    section = BenchSection(new_tokens=4, warmup=0, repetitions=1)
    report = bench(tiny_artifact, section, None, BenchOptions(workloads=("chat",), stress=1, loads=0))
    assert (
        report["samples"][0]["turn"] == 1 and report["samples"][0]["cached_tokens"] == 0
    )  # as in the quiet round before


def test_unknown_and_missing_providers(tiny_artifact: Path):  # noqa: F811
    section = BenchSection(prompt_tokens=10, new_tokens=4, warmup=0, repetitions=1)
    with pytest.raises(InputError, match=r"no provider 'gpu'\n.*cpu, cuda"):
        bench(tiny_artifact, section, None, BenchOptions(provider="gpu", loads=0))
    with pytest.raises(InputError, match="needs the execution provider QNNExecutionProvider"):
        bench(tiny_artifact, section, None, BenchOptions(provider="qnn", loads=0))


def test_cold_load_says_when_it_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_bytes(b"x" * 9000)
    monkeypatch.setattr(module, "_cached", lambda handle: True)
    if hasattr(os, "posix_fadvise"):
        assert "stays in the page cache" in str(module.drop_from_cache([tmp_path / "file"]))
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    assert "no way" in str(module.drop_from_cache([tmp_path / "file"]))


def test_worker_imports_neither_torch_nor_transformers(tiny_artifact: Path):  # noqa: F811
    code = (
        "import sys; from pathlib import Path; from edgetune.runtime.bench import worker, workloads\n"
        f"job = {{'artifact': {str(tiny_artifact)!r}, 'threads': 1, 'provider': None, 'session': SESSION,"
        " 'session_options': {}, 'prefill_tokens': None, 'use_profile': True, 'huge_pages': True, 'adapter': None, 'speculation': 'auto', 'exact': False}\n"
        "engine, _ = worker.opened(job)\n"
        "print(len(engine.round(engine.prepare(workloads.Workload(*WORK), 0, 1) - 1)))\n"
        "print(sorted({'torch', 'transformers', 'peft', 'matplotlib'} & set(sys.modules)))"
    )
    for session, work in ((False, "('drawn', 8, 2)"), (True, "('chat', 0, 2)")):
        script = code.replace("SESSION", str(session)).replace("*WORK", f"*{work}")
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert done.stdout.splitlines()[1:] == ["[]"], done.stdout + done.stderr
