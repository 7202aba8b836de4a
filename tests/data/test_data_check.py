"""`edgetune data check`, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_templates import chat
from typer.testing import CliRunner, Result

from conftest import SHARED, edgetune, write_jsonl
from edgetune.cli import app


def here(*args: object) -> Result:
    """Run the command in this process, which has imported transformers already."""
    return CliRunner().invoke(app, [str(arg) for arg in ("data", "check", *args)])


def test_a_good_file_without_a_model(tmp_path: Path, tiny_rows: list[Any]) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{**row, "id": n} for n, row in enumerate(tiny_rows)])
    done = edgetune("data", "check", "a.jsonl", cwd=tmp_path)
    assert done.returncode == 0
    assert "a.jsonl (16 rows); form: messages" in done.stdout
    assert "rows by length in characters" in done.stdout
    assert "user: What is" in done.stdout
    assert "⟦It is" in done.stdout
    assert "keys that are not used: id (16)" in done.stdout
    assert "no problems; tokens were not checked: add --model for that" in done.stdout
    assert "\x1b" not in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_with_a_model(tmp_path: Path, tiny_model: Path, tiny_rows: list[Any]) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", tiny_rows)
    held = write_jsonl(tmp_path / "v.jsonl", [tiny_rows[3], chat("Q", "A")])
    done = edgetune("data", "check", file, "--model", tiny_model, "--validation", held, "--max-length", "200")
    assert done.returncode == 0, done.stderr
    assert "limit 200 tokens: rows over it: 0 (error)" in done.stdout
    assert "overlap: training rows that are also validation rows: 1" in done.stdout
    assert "an answer ends with <|im_end|> (id 2)" in done.stdout
    assert "⟦It is 0.<|im_end|>⟧" in done.stdout


def test_problems(tmp_path: Path, tiny_model: Path, tiny_rows: list[Any]) -> None:
    rows = [*tiny_rows[:6], '{"messages": [', chat("Q", ""), chat("Q", "\x1b[31mred" * 100)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    args = ("data", "check", "a.jsonl", "--model", str(tiny_model), "--max-length", "100")
    done = edgetune(*args, cwd=tmp_path)
    assert done.returncode == 2
    found = done.stdout.split("3 problems:\n")[1].splitlines()
    assert [line.split(": ")[0] for line in found] == ["  a.jsonl:7", "  a.jsonl:8", "  a.jsonl:9"]
    assert "the answer is empty; write it, or remove the row" in found[1]
    as_json = here(tmp_path / "a.jsonl", *args[3:], "--json")
    assert as_json.exit_code == 2
    result = json.loads(as_json.stdout)
    assert (result["ok"], result["problem_count"]) == (False, 3)
    assert result["problems"][0]["where"] == "a.jsonl:7"
    assert result["report"]["rows"]["train"] == 5
    assert {piece["learned"] for piece in result["example"]} == {True, False}


@pytest.mark.parametrize(("content", "words"), [(None, "no such file"), (b"", "is empty"), (b"\xff\xfe[", "UTF-16")])
def test_a_file_that_cannot_be_read(tmp_path: Path, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    for more in ([], ["--json"]):
        done = edgetune("data", "check", "a.json", *more, cwd=tmp_path)
        assert done.returncode == 2
        assert words in done.stdout
        assert "Traceback" not in done.stderr


def test_escape_sequences_do_not_reach_the_terminal(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [chat("Q", f"\x1b[31mred {n}") for n in range(3)])
    done = edgetune("data", "check", "a.jsonl", cwd=tmp_path)
    assert done.returncode == 0
    assert "\x1b" not in done.stdout


def test_a_recipe(tmp_path: Path, tiny_model: Path, tiny_rows: list[Any]) -> None:
    write_jsonl(tmp_path / "sub" / "a.jsonl", tiny_rows)
    recipe = tmp_path / "sub" / "r.yaml"
    recipe.write_text(
        f"model: {{id: {tiny_model}}}\ndata: {{train: a.jsonl, validation: {{auto: 0.25}}, train_on: last}}\n"
    )
    done = here(recipe, "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)["report"]
    assert report["rows"]["validation"] == 4
    assert (report["unit"], report["settings"]["train_on"]) == ("tokens", "last")
    done = here(recipe, "--train-on", "all", "--max-length", "20")
    assert done.exit_code == 2
    assert "16 problems:" in done.stdout


def test_usage(tmp_path: Path, tiny_model: Path) -> None:
    done = here(tmp_path / "a.jsonl", "--max-length", "64")
    assert done.exit_code == 2
    assert "add --model" in done.stderr
    done = here(tmp_path / "a.jsonl", "--model", tiny_model, "--max-length", "513")
    assert done.exit_code == 2
    assert "the model's context is 512" in done.stderr
    assert "Examples:" in here("--help").stdout


def test_real_rows() -> None:
    file = SHARED / "data" / "chat" / "instructlab_train.jsonl"
    if not file.is_file():
        pytest.skip("needs ../shared/data/chat beside the checkout")
    done = edgetune("data", "check", file, "--validation", file.with_name("instructlab_validation.jsonl"))
    assert done.returncode == 0
    assert "(4,000 rows)" in done.stdout
