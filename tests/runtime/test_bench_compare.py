"""Comparing: ratios, verdicts in words, saved reports, the limit; and the page."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest

from artifacts import copy_of, edit_json, known_bandwidth, seal, tiny_artifact  # noqa: F401
from conftest import edgetune
from edgetune.errors import GateError, InputError
from edgetune.files import write_json
from edgetune.recipe import BenchOptions, BenchSection
from edgetune.run import RunFolder
from edgetune.runtime.bench.compare import compare
from edgetune.runtime.bench.figures import _rates_at
from edgetune.runtime.bench.page import as_html
from edgetune.runtime.bench.plots import Axis, nice_step, number
from edgetune.runtime.bench.report import quality, read_report, schema, siblings
from edgetune.runtime.bench.statistics import Ratio
from edgetune.runtime.bench.text import METRIC_HEAD, as_markdown, table
from edgetune.runtime.bench.verdict import against, check, words

SECTION = BenchSection(prompt_tokens=30, new_tokens=6, warmup=1, repetitions=3)


@pytest.fixture(scope="module")
def compared(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:  # noqa: F811
    out = tmp_path_factory.mktemp("compared")
    options = BenchOptions(workloads=("pp30+tg6", "pp20"), loads=0)
    return compare(tiny_artifact, tiny_artifact, SECTION, out, options), out


def slower(report: dict[str, Any], factor: float) -> dict[str, Any]:
    """The same measurement on something slower."""
    found = copy.deepcopy(report)
    found["comparison"] = None
    for sample in found["samples"]:
        for key in ("prefill_tokens_per_s", "decode_tokens_per_s"):
            sample[key] = sample[key] and sample[key] / factor
    return found


def test_two_in_turn(compared: tuple[dict[str, Any], Path]):
    report, out = compared
    jsonschema.validate(report, schema(), cls=jsonschema.Draft202012Validator)
    found = report["comparison"]
    assert found["interleaved"] and (found["name"], found["baseline"]) == ("tiny (now)", "tiny (baseline)")
    assert [(one["workload"], one["what"]) for one in found["ratios"]] == [
        *(("pp30+tg6", "prefill"), ("pp30+tg6", "decode"), ("pp20", "prefill"))
    ]
    assert all(one["low"] < one["value"] < one["high"] for one in found["ratios"]) and not found["faults"]
    assert all(note.startswith("tiny (baseline): ") for note in found["notes"])  # of a noisy machine
    assert found["report"]["tokens_sha256"] == report["tokens_sha256"]
    assert [row for row in table(report) if row[0] == "verdict"] and read_report(
        out / "report.json", "artifact"
    ) == report


def test_known_factor_in_words(compared: tuple[dict[str, Any], Path]):
    report, _ = compared
    found = against(report, slower(report, 1.25), interleaved=True)
    assert found["ratios"][1]["value"] == pytest.approx(1.25, rel=1e-3)
    assert "tiny (now) is 1.25 times as fast as tiny (baseline) in decode (1.25 to 1.25)" in found["verdict"][1]
    back = against(slower(report, 2), report, interleaved=True)
    assert "is slower than" in back["verdict"][0] and "0.50 times its speed" in back["verdict"][0]
    check(found, 0.95)
    with pytest.raises(GateError, match=r"slower than 0.95 times tiny \(baseline\): pp30\+tg6 prefill 0.500"):
        check(back, 0.95)


def test_verdicts():
    assert words(Ratio(1.01, 0.98, 1.04), "prefill", "A", "B") == "prefill is no different (0.98 to 1.04)"
    assert "cannot be told apart" in words(Ratio(1.0, 0.7, 1.4), "decode", "A", "B")
    assert "in one round" in words(Ratio(1.3, None, None), "decode", "A", "B")
    assert words(Ratio(1.12, 1.08, 1.16), "decode", "A", "B") == "A is 1.12 times as fast as B in decode (1.08 to 1.16)"


def test_what_else_differs_is_told(compared: tuple[dict[str, Any], Path]):
    report, _ = compared
    other = copy.deepcopy(report)
    other["threads"], other["hardware"]["cpu"]["model"] = 64, "Another"
    other["versions"]["onnxruntime"] = "1.0"
    notes = " ".join(against(report, other, interleaved=False)["notes"])
    for word in ("different processors", "different threads", "onnxruntime"):
        assert word in notes
    other["workloads"] = [{**other["workloads"][0], "name": "tg1"}]
    with pytest.raises(InputError, match="no workload in common"):
        against(report, other, interleaved=False)


def test_other_tokens_of_the_same_files_fail(compared: tuple[dict[str, Any], Path]):
    report, _ = compared
    wrong = copy.deepcopy(slower(report, 2))
    wrong["samples"][1]["tokens_sha256"] = "0" * 64
    found = against(report, wrong, interleaved=True)
    assert (
        len(found["faults"]) == 1 and "pp30+tg6: the produced tokens differ, though the files are" in found["faults"][0]
    )
    with pytest.raises(GateError, match="answers wrongly") as caught:
        check(found, 0.01)
    assert caught.value.exit_code == 3
    assert [row for row in table({**report, "comparison": found}) if row[0] == "fault"]
    jsonschema.validate({**report, "comparison": found}, schema(), cls=jsonschema.Draft202012Validator)
    wrong["files"] = {**wrong["files"], "model.onnx": "0" * 64}  # another artifact gives other tokens
    found = against(report, wrong, interleaved=True)
    assert not found["faults"] and "pp30+tg6: the produced tokens differ" in found["notes"]
    fewer = slower(report, 2)  # fewer rounds are no other tokens
    fewer["samples"] = [sample for sample in fewer["samples"] if sample["round"] < 3]
    fewer["workloads"][0]["tokens_sha256"] = "0" * 64
    assert not against(report, fewer, interleaved=False)["faults"]


def test_a_report_that_does_not_tell_the_tokens_of_a_sample(compared: tuple[dict[str, Any], Path]):
    report, _ = compared
    old = slower(report, 2)
    for sample in old["samples"]:
        del sample["tokens_sha256"]
    assert not against(report, old, interleaved=False)["faults"]
    old["workloads"][0]["tokens_sha256"] = "0" * 64
    assert against(report, old, interleaved=False)["faults"]
    old["workloads"][0]["rounds"] = 9
    assert not against(report, old, interleaved=False)["faults"]


def test_a_missing_workload_fails(compared: tuple[dict[str, Any], Path]):
    report, _ = compared
    fewer = {**report, "workloads": report["workloads"][:1]}
    found = against(fewer, slower(report, 2), interleaved=False)
    assert found["faults"] == ["pp20 was measured of tiny (baseline) only"]
    with pytest.raises(GateError, match=r"pp20 was measured of tiny \(baseline\) only"):
        check(found, 0.01)
    found = against(slower(report, 0.5), fewer, interleaved=False)
    assert not found["faults"] and "pp20 was measured of tiny (now) only" in found["notes"]


def test_saved_report_and_limit(tiny_artifact: Path, tmp_path: Path, compared: tuple[dict[str, Any], Path]):  # noqa: F811
    report, _ = compared
    saved = tmp_path / "fast.json"
    write_json(saved, slower(report, 0.001))  # a thousand times as fast as this
    short = ("--workload", "pp30+tg6,pp20", "--warmup", "0", "--repetitions", "2", "--loads", "0")
    done = edgetune("bench", tiny_artifact, *short, "--compare", saved, "--fail-below", "0.95", cwd=tmp_path)
    assert done.returncode == 3 and "slower than 0.95 times" in done.stderr and "measured before" in done.stdout
    write_json(saved, slower(report, 1000))
    done = edgetune("bench", tiny_artifact, *short, "--compare", saved, "--fail-below", "0.95", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    jsonschema.validate(found, schema(), cls=jsonschema.Draft202012Validator)
    assert not found["comparison"]["interleaved"]


def test_contexts_of_two_sizes_are_measured_at_the_smaller(tiny_artifact: Path, tmp_path: Path):  # noqa: F811
    small = copy_of(tiny_artifact, tmp_path)
    config = json.loads((small / "genai_config.json").read_text())
    config["search"]["max_length"] = 100
    edit_json(small / "genai_config.json", search=config["search"])
    seal(small)
    options = BenchOptions(workloads=("tg4@d200",), loads=0)
    report = compare(tiny_artifact, small, SECTION, None, options)
    assert [entry["name"] for entry in report["workloads"]] == ["tg4@d95"]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({}, "is not a report"),
        ([], "is not a report"),
        ({"format": "edgetune/bench/1"}, "older edgetune"),
        ({"format": "edgetune/bench/1", "workloads": [], "samples": [{}]}, "lacks"),
        ({"format": "edgetune/bench/1", "workloads": [1], "samples": []}, "lacks"),
    ],
)
def test_what_is_no_report(tiny_artifact: Path, tmp_path: Path, content: Any, what: str):  # noqa: F811
    write_json(tmp_path / "r.json", content)
    with pytest.raises(InputError, match=what):
        compare(tiny_artifact, tmp_path / "r.json", SECTION)
    (tmp_path / "r.json").write_text("{")
    with pytest.raises(InputError, match="not a JSON file"):
        compare(tiny_artifact, tmp_path / "r.json", SECTION)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("hardware", "cpu", "model"), 5),
        (("versions",), 5),
        (("files",), 5),
        (("warnings",), 5),
        (("peak_rss_mb",), "x"),
        (("size_mb",), -1),
        (("samples", 0, "decode_tokens_per_s"), "fast"),
        (("samples", 0, "decode_tokens_per_s"), -1),
        (("samples", 0, "prefill_tokens_per_s"), 0),
        (("samples", 0, "prefill_tokens_per_s"), float("inf")),
        (("samples", 0, "prefill_tokens_per_s"), float("nan")),
        (("samples", 0, "itl_ms", 0), 10**400),
        (("workloads", 0, "ttft_ms", "p50"), None),
        (("target",), "artifact"),
    ],
)
def test_a_damaged_report_is_refused_before_anything_is_measured(
    tmp_path: Path, compared: tuple[dict[str, Any], Path], place: tuple[Any, ...], value: Any
):
    report = json.loads(json.dumps(compared[0]))  # parts that stand there twice are two
    at = report
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    file = tmp_path / "r.json"
    file.write_text(json.dumps(report))
    with pytest.raises(InputError, match="is no whole report: ") as caught:
        compare(tmp_path / "nothing there", file, SECTION)
    assert str(place[0]) in caught.value.what and caught.value.where == str(file) and caught.value.fix


def test_page_needs_nothing_else(compared: tuple[dict[str, Any], Path]):
    report, out = compared
    text = (out / "report.html").read_text(encoding="utf-8")
    assert text == as_html(report)
    assert not re.search(r"https?://|<script|@import|url\(|src=|href=", text)
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(pictures) == 5  # comparison, latency, position, parts, memory
    assert text.count('class="line dashed') == 3 and text.count("<th>std</th>") == 2  # the baseline's lines and metrics
    for picture in pictures:
        drawn = ElementTree.fromstring(picture)
        numbers = [float(n) for at in drawn.iter() for n in re.findall(r"-?[\d.]+", at.get("points", ""))]
        assert all(-1 <= n <= 450 for n in numbers)
    assert text.count("prefers-color-scheme:dark") == 1 and "width=device-width" in text


def test_page_and_markdown_escape_what_they_are_told(compared: tuple[dict[str, Any], Path]):
    report, _ = compared
    nasty = {**report, "artifact": "<b>|x&</b>", "warnings": ["<script>"], "files": {"<i>": "1"}}
    text = as_html(nasty)
    assert "<b>|" not in text and "<script>" not in text and "<i>" not in text.replace('<i class="c', "")
    lines = [line.count("|") for line in as_markdown(nasty).splitlines() if line.startswith("|")]
    assert set(lines) == {3, 1 + len(METRIC_HEAD)}


def test_quality_speed_size_of_runs_beside(tmp_path: Path, compared: tuple[dict[str, Any], Path]):
    report, _ = compared
    said = {"kld_mean": 0.01, "top1_agreement": 0.9, "passed": True}
    for name in ("one", "two", "other-machine"):
        write_json(tmp_path / name / "verify" / "report.json", said)
        write_json(tmp_path / name / "artifact" / "manifest.json", manifest(outputs={"model.onnx": {"sha256": name}}))
        there = copy.deepcopy(report)
        there["comparison"] = None
        if name == "other-machine":
            there["hardware"]["cpu"]["model"] = "Another"
        write_json(tmp_path / name / "bench" / "report.json", there)
        for stage in ("verify", "bench"):
            content = RunFolder(tmp_path / name).content("export")
            write_json(tmp_path / name / stage / "manifest.json", manifest(inputs={"artifact": content}))
    (tmp_path / "broken" / "bench").mkdir(parents=True)
    (tmp_path / "broken" / "bench" / "report.json").write_text("{")
    found = siblings(tmp_path / "one" / "artifact", {**report, "quality": said})
    assert [(one["name"], one["this"]) for one in found] == [("one", True), ("two", False)]
    shown = as_html({**report, "quality": said, "siblings": found})
    assert "Quality, speed, size" in shown and "two, " in shown and "KL 0.0100" in shown
    assert siblings(tmp_path / "one" / "artifact", {**report, "quality": None}) == []
    assert quality(tmp_path / "two" / "artifact") == said
    write_json(tmp_path / "two" / "artifact" / "manifest.json", manifest(outputs={"model.onnx": {"sha256": "new"}}))
    assert quality(tmp_path / "two" / "artifact") is None  # another artifact than the one that was verified
    assert [one["name"] for one in siblings(tmp_path / "one" / "artifact", {**report, "quality": said})] == ["one"]
    both = {**report, "quality": said, "siblings": []}
    both["comparison"] = {**report["comparison"], "report": {**report["comparison"]["report"], "quality": said}}
    assert as_html(both).count("KL 0.0100") == 3  # in the numbers, and of both in the plot


def manifest(**said: Any) -> dict[str, Any]:
    return {"format": "edgetune/manifest/1", **said}


def test_tokens_that_were_guessed_ahead_share_the_time_of_their_step():
    sample = {"itl_ms": [40.0, 0.01, 0.01, 0.01, 20.0], "accepted_tokens": 3}
    assert [round(rate) for _, rate in _rates_at(sample)] == [100, 100, 100, 100, 50]
    assert [n for n, _ in _rates_at(sample)] == [1, 2, 3, 4, 5]
    assert _rates_at({"itl_ms": [40.0, 0.0, 20.0]}) == [(1, 25.0), (3, 50.0)]


def test_axes_have_round_numbers():
    assert nice_step(10) == 2 and nice_step(0.7) == pytest.approx(0.2) and nice_step(0) == 1
    assert [text for _, text in Axis("", 0, 10).ticks()] == ["0", "2", "4", "6", "8", "10"]
    assert [text for _, text in Axis("", 0.5, 60, log=True).ticks()] == ["0.5", "1", "2", "5", "10", "20", "50"]
    assert Axis("", 1, 100, log=True).share(10) == pytest.approx(0.5) and Axis("", 0, 1).share(7) == 1
    assert (number(12345.6), number(0.00001), number(1.5)) == ("12,346", "1e-05", "1.5")
