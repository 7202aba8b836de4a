"""Targets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgetune.errors import InputError
from edgetune.export.targets import limits_of, load_target, names, require_fit, status_of, with_limits
from edgetune.recipe import Limits, Recipe
from edgetune.runtime.providers import PROVIDERS
from edgetune.stage_work import left_out


def test_the_shipped_targets_say_what_they_need_what_they_forbid_and_their_limits() -> None:
    assert {"cpu-fp32", "cpu-int8", "cpu-int4"} <= set(names())
    for name in names():
        target = load_target(name)
        assert target.description and target.needs
        assert {"graph", "limits"} <= target.model_fields_set, name
        assert target.limits.model_fields_set == set(Limits.model_fields), name
        assert target.graph.forbidden_types


def test_a_target_for_another_processor_does_not_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    target = load_target("mobile-arm64-int4")
    monkeypatch.setattr("edgetune.export.targets.architecture", lambda: "x86-64")
    found = status_of(target)
    assert not found.runs and found.note == "is for arm64 processors, and this one is x86-64"
    assert status_of(load_target("cpu-int4")).runs
    monkeypatch.setattr("edgetune.export.targets.architecture", lambda: "arm64")
    assert status_of(target).runs


def test_unknown_names_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean `cpu-int8`"):
        load_target("cpu-int88")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("precision: int3\nprovider: cpu\ndescription: x\nneeds: y\n", "precision"),
        ("precision: int8\nprovider: cpu\ndescription: x\n", "needs"),
        ("precision: int8\nprovider: cpu\ndescription: x\nneeds: y\nextra: 1\n", "extra"),
        ("a: [", "YAML"),
        ("", "input"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        load_target(str(path))


@pytest.mark.parametrize(
    "name",
    [
        "cuda-fp16", "cuda-bf16", "cuda-int4", "dml-int4", "webgpu-int4", "tensorrt-rtx-fp16", "mobile-arm64-int4",
        "qnn-npu", "vitisai-fpga", "openvino-cpu",
    ],
)  # fmt: skip
def test_targets_for_other_devices_say_what_they_forbid(name: str) -> None:
    target = load_target(name)
    assert target.graph.forbidden_types and target.limits.kld_mean > 0
    assert bool(target.static) == (target.provider in ("qnn", "vitisai"))
    assert target.provider == "cpu" or target.provider in PROVIDERS


def test_static_shapes_are_of_eight_bits(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("precision: int4\nprovider: qnn\ndescription: x\nneeds: y\nstatic: {prefill: 32}\n")
    with pytest.raises(InputError, match="set precision: int8"):
        load_target(str(path))
    path.write_text("precision: int8\nprovider: dml\ndescription: x\nneeds: y\nstatic: {prefill: 32}\n")
    with pytest.raises(InputError, match="goes with the providers cpu, "):
        load_target(str(path))


def test_the_recipe_overrides_the_targets_limits_one_by_one() -> None:
    target = load_target("cuda-fp16")
    own = Limits.model_validate({"kld_mean": 0.05})  # the default, said aloud
    found = with_limits(target, own)
    assert found.kld_mean == 0.05 and found.kld_p99 == target.limits.kld_p99 == 0.1


def test_limits_travel_in_the_manifest(tmp_path: Path) -> None:
    assert limits_of(tmp_path) == Limits()
    work = {"options": {"target": load_target("cuda-fp16").options_of_work()}}
    (tmp_path / "manifest.json").write_text(json.dumps(work))
    assert limits_of(tmp_path).top1_agreement == 0.97


def test_a_run_for_another_processor_is_compared_here_and_measured_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"model": {"id": "m"}, "data": {"train": "t"}, "export": {"target": "mobile-arm64-int4"}}
    recipe = Recipe.model_validate(given)
    monkeypatch.setattr("edgetune.export.targets.architecture", lambda: "x86-64")
    why_not = status_of(load_target("mobile-arm64-int4")).note
    told = {"device": {"provider": "cpu", "ran": False, "ran_on_cpu": True, "why_not": why_not}}
    assert not left_out("verify", recipe, told) and left_out("bench", recipe, told)
    said = capsys.readouterr().err
    assert "bench: left out: the target is for arm64 processors, and this one is x86-64" in said
    monkeypatch.setattr("edgetune.export.targets.architecture", lambda: "arm64")
    assert not left_out("bench", recipe, told)


def test_a_model_whose_heads_do_not_fit(tmp_path: Path) -> None:
    def model(size: int) -> Path:
        (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 5, "hidden_size": 5 * size}))
        return tmp_path

    for name in ("cpu-int8", "cuda-fp16", "dml-int4"):
        require_fit(load_target(name), model(16))
        with pytest.raises(InputError, match=r"heads have 12 numbers; .* needs a multiple of"):
            require_fit(load_target(name), model(12))
    require_fit(load_target("dml-int4"), model(24))
    with pytest.raises(InputError, match="attention on cpu needs a multiple of 16"):
        require_fit(load_target("cpu-fp32"), model(24))
    (tmp_path / "config.json").write_text('{"hidden_size": 60, "num_attention_heads": 5, "head_dim": 16}')
    require_fit(load_target("cuda-fp16"), tmp_path)


def test_the_provider_stands_in_the_runtimes_configuration() -> None:
    from edgetune.export.decoder import _name_provider

    for name, said, shared in (("openvino-cpu", "OpenVINO", False), ("qnn-npu", "QNN", True), ("cpu-int4", None, True)):
        config: dict[str, Any] = {"model": {"decoder": {}}, "search": {"past_present_share_buffer": True}}
        _name_provider(config, load_target(name))
        asked = config["model"]["decoder"].get("session_options", {}).get("provider_options", [])
        assert [key for entry in asked for key in entry] == ([said] if said else [])
        assert config["search"]["past_present_share_buffer"] is shared
