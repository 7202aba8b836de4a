"""`edgetune generate` as a user runs it."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from artifacts import copy_of, seal, tiny_artifact  # noqa: F401
from conftest import edgetune

FLAT = '{"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}}, "required": ["n"], "additionalProperties": false}'


def test_prompt_from_argument_file_and_pipe(tiny_artifact: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "p.txt").write_text("What is it?\n")
    asked = ["generate", tiny_artifact, "--max-tokens", "12"]
    runs = [
        edgetune(*asked, "What is it?", stdin=""),
        edgetune(*asked, "--file", tmp_path / "p.txt", stdin=""),
        edgetune(*asked, stdin="What is it?\n"),
    ]
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert runs[0].stdout == runs[1].stdout == runs[2].stdout != ""
    assert "cut after 12 tokens" in runs[0].stderr


def test_json_and_stats(tiny_artifact: Path, tmp_path: Path) -> None:  # noqa: F811
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    (run_folder / "artifact").symlink_to(tiny_artifact)
    asked = ["Hi", "--max-tokens", "5", "--system", "Be short.", "--stats"]
    done = edgetune("generate", run_folder, *asked, "--json")
    assert done.returncode == 0
    found = json.loads(done.stdout)
    assert found["completion_tokens"] == 5 and found["finish_reason"] == "length"
    assert found.keys() == {
        "text", "finish_reason", "prompt_tokens", "cached_tokens", "completion_tokens", "ttft_s", "decode_tokens_per_s",
        "drafted_tokens", "accepted_tokens",
    }  # fmt: skip
    assert f"prompt {found['prompt_tokens']} tokens, answer 5 tokens, time to first token" in done.stderr
    plain = edgetune("generate", tiny_artifact, *asked)
    assert plain.stdout == found["text"]
    raw = edgetune("generate", tiny_artifact, "Hi", "--raw", "--max-tokens", "5", "--json")
    assert json.loads(raw.stdout)["prompt_tokens"] < found["prompt_tokens"]


def test_seed_stop_and_schema(tiny_artifact: Path) -> None:  # noqa: F811
    drawn = ["generate", tiny_artifact, "Hi", "--max-tokens", "30", "--temperature", "1", "--top-k", "0", "--seed"]
    one, again, two = (edgetune(*drawn, seed).stdout for seed in ("1", "1", "2"))
    assert one == again != two
    stop = next(c for c in one[3:] if c.isalnum())
    stopped = edgetune(*drawn, "1", "--stop", stop, "--stop", "never said")
    assert stopped.stdout == one[: one.index(stop)]
    made = edgetune("generate", tiny_artifact, "Hi", "--json-schema", FLAT)
    assert (made.returncode, list(json.loads(made.stdout))) == (0, ["n"])


def test_constraints_and_probabilities(tiny_artifact: Path) -> None:  # noqa: F811
    made = edgetune(
        "generate", tiny_artifact, "Hi", "--regex", "[a-c]{3}", "--json", "--logprobs", "2", "--prompt-logprobs", "0"
    )
    found = json.loads(made.stdout)
    assert re.fullmatch("[a-c]{3}", found["text"])
    assert [len(entry["top"]) for entry in found["logprobs"]] == [2] * found["completion_tokens"]
    assert len(found["prompt_logprobs"]) == found["prompt_tokens"] and found["prompt_logprobs"][0] is None
    said = edgetune("generate", tiny_artifact, "Hi", "--grammar", 'start: "yes" | "no"')
    assert said.returncode == 0 and said.stdout in ("yes", "no")
    cut = edgetune("generate", tiny_artifact, "Hi", "--regex", "[a-c]{30}", "--max-tokens", "3")
    assert cut.returncode == 1 and "before it fitted the regular expression" in cut.stderr
    biased = edgetune("generate", tiny_artifact, "Hi", "--logit-bias", "50=100", "--max-tokens", "4")
    assert biased.stdout == "PPPP"


def test_a_tool_is_called(tiny_artifact: Path, tmp_path: Path) -> None:  # noqa: F811
    copy = copy_of(tiny_artifact, tmp_path)
    template = copy / "chat_template.jinja"
    template.write_text("{% if tools %}{{ tools | length }}{% endif %}" + template.read_text())
    seal(copy)
    schema = '{"type": "object", "properties": {"name": {"const": "f"}, "arguments": {"const": {}}}, "required": ["name", "arguments"], "additionalProperties": false}'
    asked = ["Hi", "--tools", '[{"function": {"name": "f"}}]', "--json-schema", schema]
    done = edgetune("generate", copy, *asked)
    assert (done.returncode, json.loads(done.stdout)) == (0, {"name": "f", "arguments": {}}), done.stderr
    whole = json.loads(edgetune("generate", copy, *asked, "--json").stdout)
    assert whole["text"] == "" and whole["tool_calls"][0]["name"] == "f"


def test_json_that_is_cut_is_a_failure(tiny_artifact: Path) -> None:  # noqa: F811
    done = edgetune("generate", tiny_artifact, "Hi", "--json-schema", FLAT, "--max-tokens", "2")
    assert done.returncode == 1
    assert "its JSON is not complete" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("args", "stdin", "what"), [
    (["a", "--file", "f"], "", "there are two prompts"),
    ([], "", "stdin: the prompt is empty"),
    (["  "], "", "error: the prompt is empty"),
    (["--file", "missing.txt"], "", "missing.txt: no such file"),
    (["a", "--temperature", "3"], "", "temperature: must be a number from 0 to 2"),
    (["a", "--top-p", "0"], "", "top_p: must be"),
    (["a", "--seed", "-1"], "", "seed: must be"),
    (["a", "--stop", ""], "", "stop: must be"),
    (["a", "--max-tokens", "0"], "", "max_tokens: must be"),
    (["a", "--threads", "0"], "", "threads: must be"),
    (["a", "--json-schema", "{"], "", "--json-schema: is not JSON"),
    (["a", "--json-schema", '{"type": "objec"}'], "", "json_schema: the schema cannot be followed"),
    (["a", "--json-schema", "[]"], "", "is not a JSON object"),
    (["a", "--regex", "(("], "", "regex: the regular expression cannot be followed"),
    (["a", "--grammar", "start: nope"], "", "grammar: the grammar cannot be followed"),
    (["a", "--grammar", "missing.lark"], "", "missing.lark: no such file"),
    (["a", "--regex", "a", "--json-schema", "{}"], "", "regex: cannot be combined with json_schema"),
    (["a", "--min-p", "2"], "", "min_p: must be"),
    (["a", "--repetition-penalty", "0"], "", "repetition_penalty: must be"),
    (["a", "--logit-bias", "x"], "", "'x' is not ID=BIAS"),
    (["a", "--logit-bias", "384=1"], "", "logit_bias: the model has 384 tokens, none with id 384"),
    (["a", "--logprobs", "2"], "", "add --json"),
    (["a", "--json", "--logprobs", "21"], "", "logprobs: must be"),
    (["a", "--tools", "[1]"], "", "tools[0]: needs"),
    (["a", "--tools", '[{"function": {"name": "f"}}]'], "", "tools: the model's chat template knows no tools"),
    (["a", "--raw", "--system", "s"], "", "--raw sends no system prompt"),
    (["word " * 300], "", "the context holds 256"),
])  # fmt: skip
def test_bad_input(tiny_artifact: Path, args: list[str], stdin: str, what: str) -> None:  # noqa: F811
    done = edgetune("generate", tiny_artifact, *args, stdin=stdin)
    assert done.returncode == 2
    assert what in done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr


def test_binary_pipe(tiny_artifact: Path) -> None:  # noqa: F811
    command = [sys.executable, "-m", "edgetune", "generate", str(tiny_artifact)]
    done = subprocess.run(command, input=b"\x80\x81\xff", capture_output=True, timeout=60, check=False)
    assert done.returncode == 2
    assert b"stdin: is not UTF-8 text" in done.stderr


def test_damaged_artifact(tiny_artifact: Path, tmp_path: Path) -> None:  # noqa: F811
    copy = copy_of(tiny_artifact, tmp_path)
    data = bytearray((copy / "model.onnx.data").read_bytes())
    data[100] ^= 1
    (copy / "model.onnx.data").write_bytes(data)
    done = edgetune("generate", copy, "Hi")
    assert done.returncode == 2
    assert "model.onnx.data: is not the file that was exported" in done.stderr and "fix:" in done.stderr


def test_on_a_terminal(tiny_artifact: Path) -> None:  # noqa: F811
    """A line end at the end, and none of the control characters that a random model writes."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "edgetune", "generate", str(tiny_artifact), "Hi", "--max-tokens", "100"]
    drawn = ["--temperature", "2", "--top-k", "0", "--seed", "3"]
    done = subprocess.run([*command, *drawn], stdout=theirs, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    piped = edgetune(*command[3:], *drawn).stdout
    assert any(ord(c) < 32 and c not in "\n\t" for c in piped)  # a pipe gets the text itself
    assert done.returncode == 0
    assert shown.endswith("\r\n") and not piped.endswith("\n")
    assert all(c in "\r\n\t" or c.isprintable() or ord(c) > 0x9F for c in shown)


def test_interrupted(tiny_artifact: Path) -> None:  # noqa: F811
    """Ctrl-C while it waits for the prompt: exit 130, no traceback."""
    code = (
        "import os, signal, sys, time\n"
        "class Pipe:\n"
        "    buffer = property(lambda self: self)\n"
        "    def isatty(self): return False\n"
        "    def read(self, most): os.kill(os.getpid(), signal.SIGINT); time.sleep(30)\n"
        f"sys.stdin, sys.argv = Pipe(), ['edgetune', 'generate', {str(tiny_artifact)!r}]\n"
        "from edgetune.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
    assert done.returncode == 130
    assert b"Traceback" not in done.stderr and b"interrupted" in done.stderr


def test_an_answer_imports_only_what_it_needs(tiny_artifact: Path):  # noqa: F811
    """The time to the first token begins with Python's start."""
    arguments = ["edgetune", "generate", str(tiny_artifact), "What", "--max-tokens", "2"]
    code = (
        "import sys\nfrom edgetune.cli import main\n"
        f"sys.argv = {arguments!r}\ntry: main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'onnx', 'onnxruntime', 'jinja2', 'yaml', 'rich', 'fastapi', 'matplotlib'}\n"
        "print('HEAVY', sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("HEAVY []\n"), done.stdout
