"""The benchmark: its numbers follow from its samples, its tokens repeat, its faults are explained."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from artifacts import MAX_LENGTH, copy_of, seal, tiny_artifact  # noqa: F401
from conftest import edgetune
from edgetune.cli.bench import command
from edgetune.errors import EdgetuneError, InputError
from edgetune.files import read_json, sha256_file
from edgetune.recipe import BenchOptions, BenchSection
from edgetune.runtime.bench import measure, watch
from edgetune.runtime.bench import process as module
from edgetune.runtime.bench.measure import bench
from edgetune.runtime.bench.report import noise, schema
from edgetune.runtime.bench.text import as_csv, as_markdown, table

SECTION = BenchSection(prompt_tokens=100, new_tokens=12, warmup=1, repetitions=4)
RATES = ("ttft_ms", "itl_ms", "prefill_tokens_per_s", "decode_tokens_per_s")


@pytest.fixture(autouse=True)
def known_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring it takes longer than the rest."""
    monkeypatch.setattr(measure, "bandwidth_gb_s", lambda: 10.0)


@pytest.fixture(scope="module")
def measured(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:  # noqa: F811
    out = tmp_path_factory.mktemp("bench")
    return bench(tiny_artifact, SECTION, out), out


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch):
    """Put a script in the worker's place."""

    def use(code: str) -> None:
        monkeypatch.setattr(module, "_COMMAND", (sys.executable, "-c", code))

    return use


def test_report_is_written_as_returned(measured):
    report, out = measured
    assert read_json(out / "report.json") == report
    assert {path.name for path in out.iterdir()} == {"report.json", "report.csv", "report.md", "report.html"}


def test_report_keeps_its_published_schema(measured):
    report, _ = measured
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.validate(report, schema(), cls=jsonschema.Draft202012Validator)
    with pytest.raises(jsonschema.ValidationError):  # it would notice
        jsonschema.validate({**report, "ttft": 1}, schema(), cls=jsonschema.Draft202012Validator)


def test_report_says_what_was_measured_and_with_what(measured, tiny_artifact: Path):  # noqa: F811
    report, _ = measured
    assert report["format"] == "edgetune/bench/1" and report["artifact"] == "tiny"
    wanted = {"prompt_tokens": 100, "new_tokens": 12, "warmup": 1, "repetitions": 4}
    assert wanted.items() <= report.items()
    assert report["threads"] >= 1 and report["load_s"] > 0 and report["verify_s"] >= 0
    assert report["files"]["model.onnx"] == sha256_file(tiny_artifact / "model.onnx")
    size = sum(path.stat().st_size for path in tiny_artifact.iterdir())
    assert report["size_mb"] == pytest.approx(size / 1e6, abs=0.01)
    assert report["hardware"]["cpu"]["model"] and report["versions"]["onnxruntime-genai"]
    assert report["load_average"].keys() == {"before", "after"}
    assert str(tiny_artifact) not in json.dumps(report)  # nothing of where it lay


def test_percentiles_follow_from_the_samples(measured):
    report, _ = measured
    samples = report["samples"]
    assert len(samples) == 4 and all(len(sample["itl_ms"]) == 11 for sample in samples)
    raw = {
        "ttft_ms": [sample["ttft_ms"] for sample in samples],
        "itl_ms": [ms for sample in samples for ms in sample["itl_ms"]],
        "prefill_tokens_per_s": [100 / sample["ttft_ms"] * 1000 for sample in samples],
        "decode_tokens_per_s": [11 / sum(sample["itl_ms"]) * 1000 for sample in samples],
    }
    for name in RATES:
        found = report[name]
        for share in (50, 95, 99):
            assert found[f"p{share}"] == pytest.approx(np.percentile(raw[name], share), rel=1e-3, abs=1e-4), name
        assert found["mean"] == pytest.approx(np.mean(raw[name]), rel=1e-3, abs=1e-4)
        assert (found["min"], found["max"]) == pytest.approx((min(raw[name]), max(raw[name])), rel=1e-3, abs=1e-4)


def test_peak_memory_is_that_of_a_small_process(measured):
    report, _ = measured
    assert 20 < report["peak_rss_mb"] < 300  # with torch in it, it would be above 300


def test_tokens_repeat_whatever_the_warmup(measured, tiny_artifact: Path):  # noqa: F811
    first, _ = measured
    again = bench(tiny_artifact, SECTION.model_copy(update={"warmup": 0}))
    assert again["tokens"] == first["tokens"] == 4 * 12
    assert again["tokens_sha256"] == first["tokens_sha256"]
    other = bench(tiny_artifact, SECTION.model_copy(update={"prompt_tokens": 99}))
    assert other["tokens_sha256"] != first["tokens_sha256"]


def test_prompts_are_distinct(measured):
    report, _ = measured
    assert len({sample["prompt_sha256"] for sample in report["samples"]}) == 4


def test_every_round_has_all_its_tokens_past_a_stop_token(tiny_artifact: Path, tmp_path: Path):  # noqa: F811
    copy = copy_of(tiny_artifact, tmp_path)
    config = read_json(copy / "genai_config.json")
    config["model"]["eos_token_id"] = list(range(2, 384))  # any token ends an answer, were it not held off
    (copy / "genai_config.json").write_text(json.dumps(config))
    seal(copy)
    report = bench(copy, SECTION)
    assert report["tokens"] == 48 and all(len(sample["itl_ms"]) == 11 for sample in report["samples"])


def test_threads_are_what_was_asked_for_or_counted(measured, tiny_artifact: Path):  # noqa: F811
    assert bench(tiny_artifact, SECTION.model_copy(update={"threads": 2}))["threads"] == 2
    report, _ = measured
    assert 1 <= report["threads"] <= report["hardware"]["cpu"]["logical_cores"]


def test_csv_has_every_sample(measured):
    report, out = measured
    rows = list(csv.DictReader((out / "report.csv").open(encoding="utf-8")))
    assert len(rows) == 4 * 12 and {row["workload"] for row in rows} == {"pp100+tg12"}
    for row in rows:
        sample = report["samples"][int(row["round"]) - 1]
        token = int(row["token"])
        wanted = sample["ttft_ms"] if token == 1 else sample["itl_ms"][token - 2]
        assert float(row["ms"]) == wanted
    assert as_csv(report) == (out / "report.csv").read_text(encoding="utf-8")


def test_markdown_has_whole_tables(measured):
    report, out = measured
    text = (out / "report.md").read_text(encoding="utf-8")
    assert text == as_markdown(report) and text.startswith("# Benchmark of tiny\n")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.count("|") == 3 and line.endswith("|") for line in rows)
    for what, value in table(report):
        assert f"| {what} | {value} |" in rows


def test_too_long_for_the_context(tiny_artifact: Path, tmp_path: Path):  # noqa: F811
    section = SECTION.model_copy(update={"prompt_tokens": 250, "new_tokens": 7})
    with pytest.raises(InputError) as caught:
        bench(tiny_artifact, section, tmp_path / "out")
    text = caught.value.text()
    assert "250 prompt tokens and 7 new tokens are 257" in text and f"holds {MAX_LENGTH}" in text
    assert not (tmp_path / "out").exists()
    assert bench(tiny_artifact, section.model_copy(update={"new_tokens": 6, "repetitions": 1}))["tokens"] == 6


def test_wrong_artifact_is_explained_as_anywhere(tiny_artifact: Path, tmp_path: Path):  # noqa: F811
    with pytest.raises(InputError, match="no such folder"):
        bench(tmp_path / "none", SECTION)
    copy = copy_of(tiny_artifact, tmp_path)
    data = bytearray((copy / "model.onnx.data").read_bytes())
    data[100] ^= 1
    (copy / "model.onnx.data").write_bytes(bytes(data))
    with pytest.raises(InputError, match="SHA-256 differs"):
        bench(copy, SECTION)


def test_out_is_no_file_and_not_in_the_artifact(tiny_artifact: Path, tmp_path: Path):  # noqa: F811
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="not a folder"):
        bench(tiny_artifact, SECTION, tmp_path / "file")
    with pytest.raises(InputError, match="inside what is measured"):
        bench(tiny_artifact, SECTION, tiny_artifact / "bench")


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


def test_noise_is_told(measured):
    report, _ = measured
    entry = report["workloads"][0]
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


def test_parts_of_a_request_add_up(measured):
    report, _ = measured
    for sample in report["samples"]:
        assert sample["prefill_ms"] + sample["sampling_ms"] == pytest.approx(sample["ttft_ms"], abs=0.003)
        parts = sample["tokenization_ms"] + sample["ttft_ms"] + sum(sample["itl_ms"]) + sample["detokenization_ms"]
        assert sample["e2e_ms"] == pytest.approx(parts, abs=0.01)
        assert sample["tpot_ms"] == pytest.approx(np.mean(sample["itl_ms"]), abs=1e-3)
    assert report["load"] is None and report["workloads"][0]["name"] == "pp100+tg12"
    assert report["peak_rss_mb"] >= max(mb for _, mb in report["memory"][0]["points"]) - 5


def test_all_kinds_of_work(tiny_artifact: Path, tmp_path: Path):  # noqa: F811
    own = tmp_path / "own.jsonl"
    own.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n{"prompt": "One, two"}\n', encoding="utf-8")
    options = BenchOptions(
        workloads=("pp20", "tg6", "pp20+tg6@d30", "chat"),
        batch_sizes=(1, 2),
        depths=(0, 1000),
        prompts=str(own),
        threads=(1, 2),
        loads=1,
    )
    section = BenchSection(prompt_tokens=10, new_tokens=4, warmup=1, repetitions=2)
    report = bench(tiny_artifact, section, None, options)
    jsonschema.validate(report, schema(), cls=jsonschema.Draft202012Validator)
    entries = {entry["name"]: entry for entry in report["workloads"]}
    assert list(entries) == [
        *("pp20", "pp20 x2", "pp20@d235", "tg6", "tg6 x2", "tg6@d249", "tg6@d249 x2", "pp20+tg6@d30", "chat", "prompts")
    ]
    assert entries["pp20"]["decode_tokens_per_s"] is None and entries["tg6"]["prefill_tokens_per_s"] is None
    assert entries["tg6 x2"]["tokens"] == 2 * 2 * 7 and entries["pp20"]["tokens"] == 2
    assert entries["prompts"]["rounds"] == 2  # each prompt once
    notes = " ".join(report["warnings"])
    assert "pp20+tg6@d30 x2 is left out" in notes and "the depth is 235, not 1,000" in notes
    turns = [sample for sample in report["samples"] if sample["workload"] == "chat"]
    assert [sample["turn"] for sample in turns][:2] == [1, 2] and all(s["new_tokens"] <= 4 for s in turns)
    assert turns[1]["prompt_tokens"] > turns[0]["prompt_tokens"]
    assert [found["threads"] for found in report["scaling"]] == [1, 2]
    assert report["load"]["warm_s"]["n"] == 1 and (report["load"]["cold_s"] or report["load"]["note"])
    assert len({sample["prompt_sha256"] for sample in report["samples"] if sample["workload"] == "pp20 x2"}) == 2
    shown = dict(table(report))
    assert "decode" in shown["tg6"] and "1.00×" in shown["1 thread"]


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


def test_stress_runs_beside_and_ends(tiny_artifact: Path):  # noqa: F811
    import psutil

    section = BenchSection(prompt_tokens=10, new_tokens=4, warmup=0, repetitions=2)
    report = bench(tiny_artifact, section, None, BenchOptions(stress=1, loads=0))
    assert report["stress"]["processes"] == 1 and 0 < report["stress"]["fair_share"] <= 1
    assert report["workloads"][0]["quiet"]["decode_tokens_per_s"]["n"] == 2
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


def test_fair_share():
    from edgetune.runtime.bench.report import fair_share

    assert fair_share(2, 2, 2) == 0.5 and fair_share(1, 1, 2) == 1 and fair_share(4, 4, 4) == 0.5
    assert fair_share(2, 1, 2) == pytest.approx(2 / 3)


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
        " 'session_options': {}, 'prefill_tokens': None, 'use_profile': True, 'huge_pages': True, 'adapter': None}\n"
        "engine, _ = worker.opened(job)\n"
        "print(len(engine.round(engine.prepare(workloads.Workload(*WORK), 0, 1) - 1)))\n"
        "print(sorted({'torch', 'transformers', 'peft', 'matplotlib'} & set(sys.modules)))"
    )
    for session, work in ((False, "('drawn', 8, 2)"), (True, "('chat', 0, 2)")):
        script = code.replace("SESSION", str(session)).replace("*WORK", f"*{work}")
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert done.stdout.splitlines()[1:] == ["[]"], done.stdout + done.stderr


def test_command_line(tiny_artifact: Path, tmp_path: Path):  # noqa: F811
    short = ("--prompt-tokens", "20", "--new-tokens", "4", "--warmup", "0", "--repetitions", "2", "--loads", "0")
    done = edgetune("bench", tiny_artifact, *short, "--json", "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == read_json(tmp_path / "out" / "report.json")
    assert json.loads(done.stdout)["repetitions"] == 2
    tokens = json.loads(done.stdout)["tokens_sha256"]
    assert "bench" in done.stderr  # progress stays off stdout

    done = edgetune("bench", tiny_artifact, *short, cwd=tmp_path)
    assert re.search(r"^decode +[\d.,]+ tokens/s", done.stdout, re.MULTILINE), done.stdout
    done = edgetune("bench", tiny_artifact, *short, "--format", "csv", cwd=tmp_path)
    assert done.stdout.splitlines()[0] == "workload,round,turn,token,ms" and len(done.stdout.splitlines()) == 1 + 2 * 4
    done = edgetune("bench", tiny_artifact, *short, "--format", "markdown", "--expect-tokens", tokens, cwd=tmp_path)
    assert done.stdout.startswith("# Benchmark of tiny")
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "edgetune-home"}  # nothing else is written


def test_other_tokens_than_expected(tiny_artifact: Path, tmp_path: Path):  # noqa: F811
    short = ("--prompt-tokens", "20", "--new-tokens", "4", "--warmup", "0", "--repetitions", "1", "--loads", "0")
    done = edgetune("bench", tiny_artifact, *short, "--expect-tokens", "0" * 64, cwd=tmp_path)
    assert done.returncode == 3 and "the produced tokens have the SHA-256" in done.stderr and "decode" in done.stdout


def test_schema_is_printed():
    done = edgetune("bench", "--schema")
    assert done.returncode == 0 and json.loads(done.stdout) == schema()


@pytest.mark.parametrize("wrong", [("--new-tokens", "1"), ("--format", "xml"), ("--prompt-tokens", "9999")])
def test_wrong_usage(tiny_artifact: Path, wrong: tuple[str, str]):  # noqa: F811
    done = edgetune("bench", tiny_artifact, *wrong)
    assert done.returncode == 2 and not done.stdout and "Traceback" not in done.stderr
    assert wrong[0].strip("-").replace("-", " ") in done.stderr.replace("-", " ")


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"workload": "pp"}, "no workload 'pp'"),
        ({"workload": "tg0"}, "measures nothing"),
        ({"depth": "-1"}, "--depth: takes whole numbers from 0"),
        ({"depth": "10", "workload": "chat"}, "depths and batches are for ppN and tgN"),
        ({"batch": "0"}, "--batch: takes whole numbers from 1"),
        ({"threads": "two"}, "--threads: takes whole numbers"),
        ({"threads": "9999"}, "threads: must be 1 to"),
        ({"prompts": Path("none.jsonl")}, "none.jsonl: no such file"),
        ({"fail_below": 0.9}, "--fail-below: needs something to compare with"),
        ({"expect_tokens": "xyz"}, "--expect-tokens: must be 8 to 64"),
        ({"url": "http://127.0.0.1:9"}, "an artifact and --url are both given"),
        ({"url": "http://127.0.0.1:9", "artifact": None, "stress": 1}, "--stress: does not go with --url"),
        ({"artifact": None}, "there is nothing to measure"),
        ({"model": "tiny"}, "--model: does not go with an artifact"),
        ({"compare": Path("none")}, "no such folder"),
        ({"compare": Path("none"), "threads": "1,2"}, "--threads: takes one number beside --compare"),
    ],
)
def test_each_wrong_option_is_named(tiny_artifact: Path, wrong: dict[str, Any], what: str):  # noqa: F811
    with pytest.raises(InputError) as caught:
        command(**{"artifact": tiny_artifact, **wrong})
    assert what in caught.value.text() and caught.value.fix


def test_help_names_no_number_that_the_recipe_owns():
    done = edgetune("bench", "--help")
    assert done.returncode == 0 and "Examples:" in done.stdout
    for field in ("prompt_tokens", "repetitions"):
        assert f"default: {BenchSection.model_fields[field].default}" not in done.stdout
