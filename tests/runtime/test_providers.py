"""Execution providers: on this machine, missing, and played by a plugin that is not one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgetune.errors import InputError
from edgetune.runtime import providers


def config(*entries: dict[str, Any]) -> dict[str, Any]:
    return {"model": {"decoder": {"session_options": {"provider_options": list(entries)}}}}


def test_what_a_configuration_asks_for() -> None:
    assert providers.named(config()) == "cpu"
    assert providers.named({"model": {"decoder": {}}}) == "cpu"
    assert providers.named(config({"NvTensorRtRtx": {}})) == "tensorrt-rtx"
    assert providers.named(config({"qnn": {"backend_type": "htp"}})) == "qnn"
    with pytest.raises(InputError, match="the provider Loihi, which edgetune does not know"):
        providers.named(config({"Loihi": {}}))


def test_a_missing_provider_is_one_message_and_never_the_cpu() -> None:
    import onnxruntime

    if "DmlExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine has it")
    with pytest.raises(InputError) as caught:
        providers.require("dml", "my-artifact")
    text = str(caught.value)
    assert text.startswith(
        "my-artifact: needs the execution provider DmlExecutionProvider, which is not installed here"
    )
    assert "the CPU does not take its place" in text and "onnxruntime-directml" in text and caught.value.exit_code == 2
    with pytest.raises(InputError, match="DmlExecutionProvider"):
        providers.open_session(Path("model.onnx"), "dml")


def test_every_node_runs_somewhere(tmp_path: Path) -> None:
    import onnx
    from onnx import helper

    value = [helper.make_tensor_value_info(name, 1, ["n"]) for name in "xz"]
    nodes = [helper.make_node("Sin", ["x"], ["y"], "a"), helper.make_node("Erf", ["y"], ["z"], "b")]
    graph = helper.make_graph(nodes, "g", value[:1], value[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "m.onnx")
    assert providers.shares(providers.open_session(tmp_path / "m.onnx")) == {"CPUExecutionProvider": 1.0}


def test_every_provider_has_a_row_and_a_cure() -> None:
    found = providers.examine()
    assert [entry["name"] for entry in found] == list(providers.PROVIDERS)
    for entry, (name, here, fix) in zip(found, providers.table(found), strict=True):
        assert name == entry["name"] and here and (entry["devices"] or fix)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def get_library_path(): return '/nowhere/lib.so'", "does not load"),
        ("raise ImportError('libfoo.so.3: cannot open')", "does not load: libfoo.so.3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "it dies with SIGILL"),
    ],
)
def test_a_plugin_that_is_broken(tmp_path: Path, code: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "onnxruntime_ep_openvino.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (found,) = providers._probe(["openvino"])
    assert not found["installed"] and said in found["note"] and found["fix"].startswith("pip install")


def test_torch_is_not_needed(tmp_path: Path) -> None:
    for name in ("torch", "transformers"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    ask = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from edgetune.runtime.providers import tell; tell('cuda', 'dml')"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert [entry["name"] for entry in json.loads(done.stdout)] == ["cuda", "dml"]
