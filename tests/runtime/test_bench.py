"""The benchmark: its numbers follow from its samples, its tokens repeat, wrong artifacts are explained."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from artifacts import MAX_LENGTH, copy_of, known_bandwidth, seal, tiny_artifact  # noqa: F401
from edgetune.errors import InputError
from edgetune.files import read_json, sha256_file
from edgetune.recipe import BenchOptions, BenchSection
from edgetune.runtime.bench.measure import bench
from edgetune.runtime.bench.report import schema
from edgetune.runtime.bench.text import METRIC_HEAD, as_csv, as_markdown, metrics, table

SECTION = BenchSection(prompt_tokens=100, new_tokens=12, warmup=1, repetitions=4)
RATES = ("ttft_ms", "itl_ms", "prefill_tokens_per_s", "decode_tokens_per_s")


@pytest.fixture(scope="module")
def measured(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:  # noqa: F811
    out = tmp_path_factory.mktemp("bench")
    return bench(tiny_artifact, SECTION, out), out


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
    assert {row["workload"] for row in rows} == {"pp100+tg12"} and {row["client"] for row in rows} == {"1"}
    assert len([row for row in rows if row["token"]]) == 4 * 12
    for row in rows:
        sample = report["samples"][int(row["round"]) - 1]
        value = sample[row["metric"]]
        assert float(row["value"]) == (value[int(row["token"]) - 2] if row["metric"] == "itl_ms" else value)
    assert {"e2e_ms", "tpot_ms", "tokenization_ms", "decode_tokens_per_s"} <= {row["metric"] for row in rows}
    assert as_csv(report) == (out / "report.csv").read_text(encoding="utf-8")


def test_markdown_has_whole_tables(measured):
    report, out = measured
    text = (out / "report.md").read_text(encoding="utf-8")
    assert text == as_markdown(report) and text.startswith("# Benchmark of tiny\n")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {3, 1 + len(METRIC_HEAD)} and all(line.endswith("|") for line in rows)
    assert all(any(cell in line for line in rows) for row in metrics(report) for cell in row)
    for what, value in table(report):
        assert f"| {what} | {value} |" in rows


def test_too_long_for_the_context(tiny_artifact: Path, tmp_path: Path):  # noqa: F811
    section = SECTION.model_copy(update={"prompt_tokens": 250, "new_tokens": 7})
    with pytest.raises(InputError) as caught:
        bench(tiny_artifact, section, tmp_path / "out")
    text = caught.value.text()
    assert "pp250+tg7 needs a context of 257 tokens" in text and f"holds {MAX_LENGTH}" in text
    assert not (tmp_path / "out").exists()
    assert bench(tiny_artifact, section.model_copy(update={"new_tokens": 6, "repetitions": 1}))["tokens"] == 6


def test_what_does_not_fit_is_left_out_and_the_rest_is_measured(tiny_artifact: Path):  # noqa: F811
    section = BenchSection(warmup=0, repetitions=1)
    report = bench(tiny_artifact, section, None, BenchOptions(workloads=("pp300", "tg4", "copy"), loads=0))
    assert [entry["name"] for entry in report["workloads"]] == ["tg4"]
    drawn, asked = (text for text in report["warnings"] if "was not measured" in text)
    assert drawn == "pp300 was not measured: pp300 needs a context of 301 tokens, the artifact's holds 256"
    assert asked.startswith("copy was not measured: copy has a prompt of ")
    with pytest.raises(InputError, match=r"copy has a prompt of (.|\n)*measure another workload"):
        bench(tiny_artifact, section, None, BenchOptions(workloads=("copy",), loads=0))


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
    assert entries["prompts"]["rounds"] == 2  # of both prompts
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
    asked = [sample for sample in report["samples"] if sample["workload"] == "prompts"]
    assert [(sample["round"], sample["turn"]) for sample in asked] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert all(sample["cached_tokens"] == 0 for sample in asked if sample["turn"] == 1)  # a round begins anew
    for sample in [*asked, *turns]:  # a session tells the parts, too
        assert sample["prefill_ms"] + sample["sampling_ms"] == pytest.approx(sample["ttft_ms"], abs=0.003)
        assert sample["detokenization_ms"] > 0 and sample["drafted_tokens"] == 0
    assert entries["chat"]["decode_ms"]["n"] == len([s for s in turns if s["itl_ms"]])
    assert entries["prompts"]["decode_tokens_per_s"]["ci95"] and entries["chat"]["drafted_tokens"] == 0


def test_guessing_ahead_is_counted(tiny_artifact: Path):  # noqa: F811
    section = BenchSection(new_tokens=24, warmup=0, repetitions=1)
    found = {}
    for name, how in (("on", {"speculation": "on"}), ("exact", {"speculation": "on", "exact": True})):
        options = BenchOptions(workloads=("chat",), loads=0, **how)
        report = bench(tiny_artifact, section, None, options)
        jsonschema.validate(report, schema(), cls=jsonschema.Draft202012Validator)
        found[name] = report["workloads"][0]["drafted_tokens"], report["workloads"][0]["accepted_tokens"]
        assert report["target"]["speculation"] == ("on" if name == "on" else "off")
        assert ("guessed ahead" in dict(table(report))) == (name == "on")
    assert found["on"][0] >= found["on"][1] and found["on"][0] > 0 and found["exact"] == (0, 0)
