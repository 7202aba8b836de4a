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

import numpy as np
import pytest

from artifacts import MAX_LENGTH, copy_of, seal, tiny_artifact  # noqa: F401
from conftest import edgetune
from edgetune.errors import EdgetuneError, InputError
from edgetune.files import read_json, sha256_file
from edgetune.recipe import BenchSection
from edgetune.runtime import bench as module
from edgetune.runtime import bench_worker
from edgetune.runtime.bench import as_csv, as_markdown, bench, table

SECTION = BenchSection(prompt_tokens=100, new_tokens=12, warmup=1, repetitions=4)
RATES = ("ttft_ms", "itl_ms", "prefill_tokens_per_s", "decode_tokens_per_s")


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
    assert {path.name for path in out.iterdir()} == {"report.json", "report.csv", "report.md"}


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
    assert len(rows) == 4 * 12
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
        "from edgetune.runtime import bench; from edgetune.recipe import BenchSection\n"
        f"bench._COMMAND = (sys.executable, '-c', {code.format(str(pid_file))!r})\n"
        "bench.bench(Path('any'), BenchSection())"
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
    cores = report["hardware"]["cpu"]["logical_cores"]
    quiet = {
        **report,
        "others_busy_cores": 0.05 * cores,
        "decode_tokens_per_s": {"p50": 100, "min": 90, "max": 110},
    }
    assert module._noise(quiet) == []
    busy = {**quiet, "others_busy_cores": 0.5 * cores}
    assert f"used {0.5 * cores:.1f} of {cores} cores" in module._noise(busy)[0]
    uneven = {**quiet, "decode_tokens_per_s": {"p50": 100, "min": 80, "max": 120}}
    assert "differ by 40%" in module._noise(uneven)[0]
    assert module._noise({**quiet, "others_busy_cores": None}) == []


def test_others_are_measured_without_the_process_itself():
    import psutil

    process = psutil.Process()
    own = process.cpu_times()
    busy, start = bench_worker._busy_s(process), time.perf_counter()
    while time.perf_counter() - start < 0.5:
        sum(range(1000))
    spent = process.cpu_times().user - own.user
    system = bench_worker._busy_s(process) - busy
    assert spent > 0.2 and system < 0.5 * ((os.cpu_count() or 1) - 1) + 0.3


def test_prompts_have_the_length_and_differ():
    def encode(text: str) -> list[int]:
        return [len(word) for word in text.split()[::2]]  # half a token a word

    prompts = bench_worker.distinct_prompts(encode, 50, 2, 3)
    assert [len(prompt) for prompt in prompts] == [50] * 5 and len({tuple(prompt) for prompt in prompts}) == 5
    assert bench_worker.distinct_prompts(encode, 50, 0, 3) == prompts[2:]
    with pytest.raises(InputError, match="not 12 different prompts of 1 tokens"):
        bench_worker.distinct_prompts(encode, 1, 0, 12)


def test_worker_imports_neither_torch_nor_transformers(tiny_artifact: Path):  # noqa: F811
    code = (
        "import json, sys; from edgetune.runtime.bench_worker import measure\n"
        f"job = {{'artifact': {str(tiny_artifact)!r}, 'prompt_tokens': 8, 'new_tokens': 2, 'warmup': 0,"
        " 'repetitions': 1, 'threads': None}\n"
        "measure(job, lambda message: None)\n"
        "print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_command_line(tiny_artifact: Path, tmp_path: Path):  # noqa: F811
    short = ("--prompt-tokens", "20", "--new-tokens", "4", "--warmup", "0", "--repetitions", "2")
    done = edgetune("bench", tiny_artifact, *short, "--json", "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == read_json(tmp_path / "out" / "report.json")
    assert json.loads(done.stdout)["repetitions"] == 2
    assert "bench" in done.stderr  # progress stays off stdout

    done = edgetune("bench", tiny_artifact, *short, cwd=tmp_path)
    assert re.search(r"^decode +[\d.,]+ tokens/s", done.stdout, re.MULTILINE), done.stdout
    done = edgetune("bench", tiny_artifact, *short, "--format", "csv", cwd=tmp_path)
    assert done.stdout.splitlines()[0] == "round,token,ms" and len(done.stdout.splitlines()) == 1 + 2 * 4
    done = edgetune("bench", tiny_artifact, *short, "--format", "markdown", cwd=tmp_path)
    assert done.stdout.startswith("# Benchmark of tiny")
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "edgetune-home"}  # nothing else is written


@pytest.mark.parametrize("wrong", [("--new-tokens", "1"), ("--format", "xml"), ("--prompt-tokens", "9999")])
def test_wrong_usage(tiny_artifact: Path, wrong: tuple[str, str]):  # noqa: F811
    done = edgetune("bench", tiny_artifact, *wrong)
    assert done.returncode == 2 and not done.stdout and "Traceback" not in done.stderr
    assert wrong[0].strip("-").replace("-", " ") in done.stderr.replace("-", " ")


def test_help_names_no_number_that_the_recipe_owns():
    done = edgetune("bench", "--help")
    assert done.returncode == 0 and "Examples:" in done.stdout
    for field in ("prompt_tokens", "repetitions"):
        assert f"default: {BenchSection.model_fields[field].default}" not in done.stdout
