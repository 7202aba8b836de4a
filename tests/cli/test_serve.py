"""`edgetune serve` as a person runs it: start, signals, ports, faults."""

# ruff: noqa: F811 - a fixture that is imported is also an argument
from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from artifacts import copy_of, tiny_artifact  # noqa: F401
from conftest import edgetune


@contextlib.contextmanager
def running(*args: str | Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """Start the service on a free port; yields the process and its ready line."""
    command = [sys.executable, "-m", "edgetune", "serve", *map(str, args), "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                pytest.fail(process.communicate()[1])
            yield process, json.loads(line)
        finally:
            process.kill()


def ask(url: str) -> Any:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    with urllib.request.urlopen(f"{url}/v1/chat/completions", json.dumps(body).encode(), timeout=30) as response:
        return json.load(response)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_starts_answers_and_ends(tiny_artifact: Path, own_home: Path, number: signal.Signals) -> None:
    with running(tiny_artifact, "--name", "tiny", "--threads", "1") as (process, ready):
        assert ready == {"url": ready["url"], "model": "tiny"}
        assert ask(ready["url"])["usage"]["completion_tokens"] >= 1
        leases = list((own_home / "leases").iterdir())
        assert json.loads(leases[0].read_text())["what"] == "edgetune serve"
        started = time.monotonic()
        process.send_signal(number)
        rest, said = process.communicate(timeout=10)
        assert time.monotonic() - started < 30
    assert (process.returncode, rest) == (0, "")
    assert f"curl {ready['url']}/v1/chat/completions" in said
    assert "POST /v1/chat/completions 200" in said
    assert said.splitlines()[-1] == "stopped"
    assert "Traceback" not in said
    assert list((own_home / "leases").iterdir()) == []
    port = int(ready["url"].rsplit(":", 1)[1])
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))


def test_the_name_is_the_artifact_s_own_when_not_given(tiny_artifact: Path) -> None:
    name = json.loads((tiny_artifact / "manifest.json").read_text()).get("name") or tiny_artifact.name
    with running(tiny_artifact) as (_, ready):
        assert ready["model"] == name


def test_port_in_use(tiny_artifact: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = edgetune("serve", tiny_artifact, "--port", str(port))
    assert result.returncode == 2
    assert f"127.0.0.1:{port}: the port is in use" in result.stderr
    assert "--port" in result.stderr
    assert (result.stdout, result.stderr.count("Traceback")) == ("", 0)


def test_a_damaged_artifact_is_not_served(tiny_artifact: Path, tmp_path: Path) -> None:
    copy = copy_of(tiny_artifact, tmp_path)
    weights = max(copy.glob("model.onnx*"), key=lambda file: file.stat().st_size)
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    result = edgetune("serve", copy, "--port", "0")
    assert result.returncode == 2
    assert weights.name in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "args",
    [
        ("--port", "70000"),
        ("--port", "x"),
        ("--queue", "-1"),
        ("--threads", "0"),
        ("--host", "no.such.invalid"),
    ],
)
def test_wrong_usage(tmp_path: Path, args: tuple[str, str]) -> None:
    result = edgetune("serve", tmp_path, "--port", "0", *args)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


def test_help_is_light() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "edgetune", "serve", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Examples:" in result.stdout
    heavy = {"fastapi", "uvicorn", "onnxruntime", "onnxruntime_genai", "torch", "numpy"}
    assert heavy.isdisjoint(line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines())


def test_serving_never_imports_what_trains(tiny_artifact: Path) -> None:
    code = (
        "import sys, edgetune.serve.server, edgetune.serve.app\n"
        "from pathlib import Path\n"
        "from edgetune.runtime.artifact import open_artifact\n"
        "from edgetune.runtime.session import Session\n"
        f"Session(open_artifact(Path({str(tiny_artifact)!r}))).close()\n"
        "print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
