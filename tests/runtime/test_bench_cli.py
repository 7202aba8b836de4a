"""`edgetune bench`: its outputs, and each wrong option by its name."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from artifacts import tiny_artifact  # noqa: F401
from conftest import edgetune
from edgetune import standalone_bench
from edgetune.cli import _terminated
from edgetune.cli.bench import command
from edgetune.errors import InputError
from edgetune.files import read_json
from edgetune.recipe import BenchSection
from edgetune.runtime.bench.report import schema


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
    assert done.stdout.splitlines()[0] == "workload,round,client,turn,metric,token,value"
    assert len([line for line in done.stdout.splitlines() if "_ms,2," in line or ",ttft_ms,1," in line]) == 2 * 2
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


SERVICE = {"url": "http://127.0.0.1:9", "artifact": None}


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
        ({"compare": "none"}, "no such folder"),
        ({"compare": "none", "threads": "1,2"}, "--threads: takes one number beside --compare"),
        ({"compare": "http://127.0.0.1:9"}, "--compare: is a service"),
        ({"compare_model": "m"}, "--compare-model: does not go with an artifact"),
        ({**SERVICE, "compare": "r.json", "compare_model": "m"}, "--compare-model: does not go with a saved report"),
        ({**SERVICE, "compare": "none.json"}, "none.json: is neither an address nor a saved report"),
        ({**SERVICE, "batch": "2"}, "--batch: does not go with --url"),
        ({**SERVICE, "speculation": "on"}, "--speculation: does not go with --url"),
        ({**SERVICE, "workload": "pp8@d9"}, "reading behind a depth cannot be timed"),
        ({**SERVICE, "depth": "10"}, "reading behind a depth cannot be timed"),
        ({**SERVICE, "workload": "xx"}, "no workload 'xx'"),
        ({"speculation": "maybe"}, "--speculation: must be auto, on or off"),
        ({"speculation": "on"}, "speculation: is for chat, copy and prompts"),
        ({"exact": True, "workload": "pp8"}, "exact: is for chat, copy and prompts"),
        ({"stress": 2000}, "--stress: input should be less than or equal to 1024, not 2000"),
        ({"repetitions": 10**20}, "--repetitions: input should be less than or equal to 10000"),
        ({"warmup": 10_001}, "--warmup: input should be less than or equal to 10000"),
        ({"loads": 10_001}, "--loads: input should be less than or equal to 10000"),
        ({"batch": "1000000"}, "--batch: takes whole numbers from 1 to 1,024"),
        ({"depth": "9" * 5000}, "--depth: takes whole numbers from 0"),
        ({"workload": ""}, "--workload: names nothing"),
        ({"workload": " ,"}, "--workload: names nothing"),
        ({"timeout": 5.0}, "--timeout: does not go with an artifact"),
        ({**SERVICE, "timeout": float("inf")}, "timeout: must be over 0 and at most 86,400 s, not inf"),
        ({**SERVICE, "timeout": float("nan")}, "timeout: must be over 0"),
        ({**SERVICE, "timeout": 0.0}, "timeout: must be over 0"),
    ],
)
def test_each_wrong_option_is_named(tiny_artifact: Path, wrong: dict[str, Any], what: str):  # noqa: F811
    with pytest.raises(InputError) as caught:
        command(**{"artifact": tiny_artifact, **wrong})
    assert what in caught.value.text() and caught.value.fix


@pytest.mark.parametrize("option", ["--stress", "--repetitions", "--warmup", "--loads"])
def test_too_many_are_refused_at_once(tmp_path: Path, option: str):
    done = edgetune("bench", tmp_path, option, "99999999999999999999")
    assert done.returncode == 2 and option in done.stderr and "unexpected" not in done.stderr


def test_a_signal_says_that_nothing_is_kept(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    def ended(*_: Any) -> None:
        _terminated(signal.SIGTERM, None)

    monkeypatch.setattr(standalone_bench, "bench_artifact", ended)
    with pytest.raises(SystemExit) as caught:
        command(Path("any"))
    assert caught.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "ended by SIGTERM; nothing is kept: the report is made when all is measured\n"


def test_help_names_no_number_that_the_recipe_owns():
    done = edgetune("bench", "--help")
    assert done.returncode == 0 and "Examples:" in done.stdout
    for field in ("prompt_tokens", "repetitions"):
        assert f"default: {BenchSection.model_fields[field].default}" not in done.stdout
