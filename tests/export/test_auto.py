"""`method: auto`: what is measured is right, it goes on where it stopped, and the artifact has the grids that were chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from edgetune.data.batch import Encoded
from edgetune.errors import InputError
from edgetune.export.quantize import auto, auto_cost, auto_sensitivity, auto_time, auto_trial
from edgetune.export.quantize.auto import CANDIDATES, find, split
from edgetune.export.quantize.auto_choice import Choice, Rest
from edgetune.export.quantize.auto_cost import Costs, Shape, products
from edgetune.export.quantize.auto_predict import BUILDER, builder_points, options
from edgetune.export.quantize.auto_sensitivity import Measured, Sensitivity, measure
from edgetune.export.quantize.auto_time import About, about
from edgetune.export.quantize.auto_trial import METHODS, rounded_inputs
from edgetune.export.quantize.grid import Grid, Quantized
from edgetune.export.quantize.rtn import min_max
from edgetune.export.quantize.smooth import round_inputs
from edgetune.export.targets import load_target, target_of, with_limits
from edgetune.files import read_json
from edgetune.models import load_model
from edgetune.recipe import AutoSection, ExportSection, Limits, Recipe
from edgetune.stage_work import with_target_limits


def _rows(count: int = 24, length: int = 60) -> list[Encoded]:
    made = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 384, (count, length), generator=made).tolist()
    return [Encoded(one, [place >= 20 for place in range(length)]) for one in ids]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_cost, "_SECONDS", 0.0)
    monkeypatch.setattr(auto_cost, "_FEWEST", 2)
    monkeypatch.setattr(auto_cost, "_BYTES_A_RUN", 1 << 14)


def _kld(folder: Path, names: list[str], grid: Grid, rows: list[Encoded]) -> float:
    """By plain transformers, with these matrices rounded."""
    wanted, other = (load_model(folder, dtype=torch.float32).eval() for _ in range(2))
    with torch.inference_mode():
        for name in names:
            module = other.get_submodule(name)
            module.weight.data = min_max(module.weight.data, grid).as_stored().dequantize()
            if name.startswith("model.layers"):
                module.register_forward_pre_hook(lambda _, args: rounded_inputs(args[0], grid))
    return _between(wanted, other, rows)


def _between(wanted: Any, other: Any, rows: list[Encoded]) -> float:
    total: list[torch.Tensor] = []
    with torch.inference_mode():
        for row in rows:
            p, q = (one(torch.tensor([row.ids])).logits[0].log_softmax(-1) for one in (wanted, other))
            kld = (p.exp() * (p - q)).sum(-1)
            total += [kld[at - 1] for at in range(1, len(row.ids)) if row.learned[at]]
    return float(torch.stack(total).double().mean())


def test_rows_whose_answers_begin_late_are_cut_behind_their_beginning() -> None:
    late = [Encoded(list(range(400)), [place >= 300 for place in range(400)]) for _ in range(8)]
    _, held_out = split(late, 100)
    assert [len(row.ids) for row in held_out] == [364, 364]


def test_a_groups_divergence_is_that_of_a_whole_model_with_only_it_rounded(tiny_model: Path, tmp_path: Path) -> None:
    rows, held_out = split(_rows(), 100)
    ids = [row.ids for row in rows]
    found = measure(tiny_model, {"int8": CANDIDATES["int8"]}, ["int8"], ids, held_out, tmp_path)
    assert [len(unit.shapes) for unit in found.units] == [3, 1, 2, 1] * 2 + [1]
    for unit in found.units:
        names = list(unit.shapes) if "lm_head" not in unit.shapes else ["lm_head", "model.embed_tokens"][:1]
        assert unit.kld["int8"] == pytest.approx(_kld(tiny_model, names, Grid(8, 64), held_out), rel=0.02, abs=1e-8)
    layers = [name for unit in found.units[:-1] for name in unit.shapes]
    assert found.together["int8"] == pytest.approx(_kld(tiny_model, layers, Grid(8, 64), held_out), rel=0.02)


def test_fewer_bits_cost_more_and_an_interrupted_measurement_goes_on(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, held_out = split(_rows(), 100)
    ids, whole, parts = [row.ids for row in rows], tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    first = measure(tiny_model, CANDIDATES, ["int4 block 32", "int8"], ids, held_out, whole)
    for unit in first.units:
        assert unit.kld["int8"] < 0.2 * unit.kld["int4 block 32"]
    assert first.together["int4 block 64"] > first.together["int4 block 32"] > first.together["int8 activations"]

    own = auto_sensitivity._Walk.layer

    def stops(walk: auto_sensitivity._Walk, number: int) -> None:
        if number == 1:
            raise KeyboardInterrupt
        own(walk, number)

    monkeypatch.setattr(auto_sensitivity._Walk, "layer", stops)
    with pytest.raises(KeyboardInterrupt):
        measure(tiny_model, CANDIDATES, ["int4 block 32", "int8"], ids, held_out, parts)
    monkeypatch.setattr(auto_sensitivity._Walk, "layer", own)
    kept = (parts / "layer-0000.json").stat().st_mtime_ns
    again = measure(tiny_model, CANDIDATES, ["int4 block 32", "int8"], ids, held_out, parts)
    assert (parts / "layer-0000.json").stat().st_mtime_ns == kept
    assert [vars(unit) for unit in again.units] == [vars(unit) for unit in first.units]
    assert again.together == first.together


def test_inputs_are_rounded_as_the_kernels_round_them() -> None:
    inputs = torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(2))
    assert torch.equal(rounded_inputs(inputs, CANDIDATES["int8 activations"]), round_inputs(inputs))
    found = rounded_inputs(inputs, CANDIDATES["int4 block 32"])
    steps = inputs.unflatten(-1, (2, 32)).abs().amax(-1).repeat_interleave(32, -1) / 127
    assert ((found - inputs).abs() <= 0.501 * steps).all()
    assert torch.equal(rounded_inputs(torch.zeros(1, 3, 32), Grid(4, 32)), torch.zeros(1, 3, 32))


def test_a_plain_rounding_is_measured_on_the_whole_model(tiny_model: Path, tmp_path: Path) -> None:
    rows, held_out = split(_rows(), 100)
    plain = {"four": Grid(4, 32), "eight": Grid(8, 32)}
    found = measure(
        tiny_model, {"int8": CANDIDATES["int8"]}, [], [row.ids for row in rows], held_out, tmp_path, plain=plain
    )
    layers = [name for unit in found.units for name in unit.shapes if name != "lm_head"]
    wanted = load_model(tiny_model, dtype=torch.float32).eval()
    for name, grid in plain.items():
        other = load_model(tiny_model, dtype=torch.float32).eval()
        head = torch.nn.Parameter(min_max(other.lm_head.weight.data, grid).dequantize())
        other.lm_head.weight = head
        if grid.bits == 4:  # a lookup of the builder's knows 4 bits only
            other.model.embed_tokens.weight = head
        for path in layers:
            module = other.get_submodule(path)
            module.weight.data = min_max(module.weight.data, grid).dequantize()
            module.register_forward_pre_hook(lambda _, args, grid=grid: rounded_inputs(args[0], grid))
        assert found.together[name] == pytest.approx(_between(wanted, other, held_out), rel=0.02)
    assert found.together["eight"] < 0.1 * found.together["four"]


def test_the_builders_sizes_are_those_that_it_has_made(tmp_path: Path) -> None:
    """SmolLM2-135M, as benchmarks/README.md has it: 88.1 and 268.6 MB."""

    class Known(Costs):
        def seconds(self, rows: int, columns: int, grid: Grid, tokens: int) -> float:
            return 1e-3 if tokens == 1 else 64e-3

        def rest(self, shape: Shape, tokens: int) -> float:
            return 1e-2 if tokens == 1 else 64e-2

    (tmp_path / "tokenizer.json").write_text(json.dumps({"words": "x" * 1_563_346}))
    model = About(Shape(30, 576, 1536, 9, 3, 64), 49152, True, 8192)
    units = [Measured("", group) for group in model.groups()]
    found = Sensitivity(units, dict.fromkeys(BUILDER, 0.1))
    points = builder_points(found, model, tmp_path, Known(tmp_path, 1, 1 << 16))
    assert [point["size_mb"] for point in points] == [pytest.approx(88.1, abs=0.05), pytest.approx(268.6, abs=0.05)]
    products = 30 * 5 + 1  # queries, keys and values are one; all positions of a prompt go through the head
    assert points[0]["decode_tokens_per_s"] == pytest.approx(1 / (1e-2 + products * 1e-3), rel=1e-3)
    assert points[0]["prefill_tokens_per_s"] == pytest.approx(2 / (1e-2 + products * 1e-3), rel=5e-3)


def test_the_better_of_two_ways_to_find_codes_is_measured_and_named(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the other way would give is worse; where GPTQ is spoiled, the other one is taken."""
    rows, held_out = split(_rows(), 100)
    ids, four = [row.ids for row in rows], {"int4 block 32": CANDIDATES["int4 block 32"]}
    found = {}
    for name, ways in (("both", METHODS), ("gptq", METHODS[:1]), ("least_error", METHODS[1:])):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(auto_trial, "METHODS", ways)
        found[name] = measure(tiny_model, four, list(four), ids, held_out, tmp_path / name).units
    for both, gptq, other in zip(*found.values(), strict=True):
        label = "int4 block 32"
        one = {"gptq": gptq, "least_error": other}[both.methods[label]]
        assert both.kld[label] == pytest.approx(one.kld[label], rel=1e-3)
    assert "gptq" in {unit.methods["int4 block 32"] for unit in found["both"]}

    def spoiled(weight: torch.Tensor, _: object, grid: Grid) -> Quantized:
        return min_max(weight * 0, grid)

    monkeypatch.setattr(auto_trial, "METHODS", METHODS)
    for module in (auto_trial, auto_sensitivity):
        monkeypatch.setattr(module, "gptq", spoiled)
    (tmp_path / "spoiled").mkdir()
    units = measure(tiny_model, four, list(four), ids, held_out, tmp_path / "spoiled").units
    assert {unit.methods["int4 block 32"] for unit in units} == {"least_error"}
    choice = Choice(options(units, four, Costs(tmp_path, 1, 1 << 16), {}), Rest())
    assert {unit.options[0].label for unit in choice.units} == {"int4 block 32, least error"}
    plan = auto._plan(choice, choice.point([0] * len(units)))
    assert set(plan.methods) == set(plan.modules) and set(plan.methods.values()) == {"least_error"}
    assert plan.method_of("lm_head") == "least_error" and plan.method_of("other") == "gptq"


def test_sizes_and_rates_that_nothing_reaches_are_told_before_divergences_are_measured(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Measures(Exception):
        pass

    def measures(*_: object, **__: object) -> None:
        raise Measures

    monkeypatch.setattr(auto, "measure", measures)
    rows, held_out = split(_rows(), 100)
    for limits in ({"size_mb": 0.01}, {"decode_tokens_per_s": 1e9}, {"size_mb": 0.01, "kld_mean": 1}):
        with pytest.raises(InputError, match=r"nearest is predicted to have \d+\.\d MB, \d") as error:
            find(tiny_model, AutoSection.model_validate(limits), rows, held_out, 128, None)
        assert error.value.fix == f"loosen {next(iter(limits))}"
    for limits in ({"size_mb": 100}, {"kld_mean": 1e-9}, {"decode_tokens_per_s": 1, "size_mb": 100}):
        with pytest.raises(Measures):
            find(tiny_model, AutoSection.model_validate(limits), rows, held_out, 128, None)


@pytest.mark.slow
def test_the_announced_time_is_of_layers_and_products_less_what_is_kept(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGETUNE_HOME", str(tmp_path))
    monkeypatch.setattr(auto_time, "_gflops", lambda: 1.0)
    rows, held_out = split(_rows(), 100)
    first = auto.measuring_left(tiny_model, rows, held_out)
    job = auto._Job(tiny_model, dict(CANDIDATES), rows, held_out)
    left, layers, costs = job.left()
    assert (left, layers + costs) == (2, first) and layers > 0
    assert costs == len(job.timed()) + 2  # a second each, and what a token costs beside them
    assert auto.measuring(tiny_model, AutoSection(), 1000) > costs
    job.say_time()
    units = job.units()
    assert [unit.shapes for unit in units] == about(tiny_model).groups()
    auto.measure_costs(job.costs, job.about, job.timed())
    assert job.left() == (2, layers, 0)
    for name in ("layer-0000.json", "layer-0001.json"):
        (job.kept / name).write_text("{}")
        assert auto.measuring_left(tiny_model, rows, held_out) < layers
    job.say_time()
    assert (
        capsys.readouterr().err.splitlines()[0].startswith("auto: measuring 2 of 2 layers and what products cost takes")
    )


@pytest.mark.slow
def test_the_plan_names_every_matrix_and_the_report_tells_of_it(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, held_out = split(_rows(), 100)
    found = find(tiny_model, AutoSection(kld_mean=0.02), rows, held_out, 128, tmp_path)
    assert len(found.plan.modules) == 2 * 7 + 1
    assert found.report["picked"]["kld_mean"] <= 0.02
    assert [point["name"] for point in found.report["builder"]] == [f"{name}, predicted" for name in BUILDER]
    assert all("decode_tokens_per_s" in point and point["size_mb"] > 0 for point in found.report["builder"])
    said = capsys.readouterr().err
    assert "model builder int4, predicted" in said and "model builder int8, predicted" in said
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    least = min(point["size_mb"] for point in found.report["front"])
    with pytest.raises(InputError, match="nearest is predicted"):
        find(tiny_model, AutoSection(size_mb=least / 2), rows, held_out, 128, tmp_path)
    small = find(tiny_model, AutoSection(size_mb=least * 1.001), rows, held_out, 128, tmp_path)
    assert small.report["picked"]["size_mb"] <= least * 1.001


def test_costs_are_positive_kept_and_of_the_products_that_the_graph_makes(tmp_path: Path) -> None:
    costs = Costs(tmp_path, 1, 1 << 16)
    for grid in CANDIDATES.values():
        for tokens in (1, auto_cost.MANY):
            assert 0 < costs.seconds(128, 64, grid, tokens) < 1
    assert 0 < costs.rest(Shape(2, 64, 128, 4, 2, 16), 1) < 1
    assert len(read_json(tmp_path / "costs.json")) == 2 * len(CANDIDATES) + 1
    shapes = {f"model.layers.0.mlp.{name}": (128, 64) for name in ("gate_proj", "up_proj")}
    assert products(shapes, CANDIDATES["int8 activations"]) == [(256, 64)]
    assert products(shapes, CANDIDATES["int8"]) == [(128, 64)] * 2
    assert products({f"{name}_proj": (rows, 64) for name, rows in (("q", 64), ("k", 32), ("v", 32))}, Grid(8)) == [
        (128, 64)
    ]


def test_a_kernel_that_is_wrong_here_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgetune.runtime.kernels.wrong", lambda: {"int4 with zero points": 0.46})
    assert set(auto._candidates()) == {"int8", "int8 activations"}


def test_the_recipes_limits_replace_the_targets_and_need_such_a_target() -> None:
    own = target_of(ExportSection(target="cpu-auto", auto=AutoSection(size_mb=100)))
    assert own.quantization is not None
    assert (own.quantization.auto.size_mb, own.quantization.auto.kld_mean) == (100, None)
    plain = target_of(ExportSection(target="cpu-auto"))
    assert plain.quantization == load_target("cpu-auto").quantization
    assert plain.quantization is not None and plain.quantization.auto.kld_mean == plain.limits.kld_mean == 0.04
    with pytest.raises(InputError, match="does not choose grids by limits"):
        target_of(ExportSection(target="cpu-int4", auto=AutoSection(size_mb=100)))


def test_null_lifts_a_limit_also_where_a_resolved_recipe_is_read_again() -> None:
    asked = ExportSection.model_validate({"target": "cpu-auto", "auto": {"kld_mean": None}})
    for section in (asked, ExportSection.model_validate_json(asked.model_dump_json())):
        found = target_of(section)
        assert found.quantization is not None and found.quantization.auto.kld_mean is None
        assert found.limits == Limits(kld_mean=0.05)  # the gate's own
    resolved = ExportSection.model_validate(ExportSection(target="cpu-auto").model_dump())
    assert target_of(resolved) == target_of(ExportSection(target="cpu-auto"))
    assert target_of(ExportSection.model_validate({"auto": {"kld_mean": None}})) == load_target("cpu-int8")


def test_the_gate_holds_what_the_grids_were_chosen_by() -> None:
    strict = target_of(ExportSection(target="cpu-auto", auto=AutoSection(kld_mean=0.02)))
    assert strict.limits.kld_mean == 0.02 and strict.limits.kld_p99 == 0.5
    assert with_limits(strict, Limits(kld_mean=0.05)).kld_mean == 0.02  # as a resolved recipe says it
    assert with_limits(strict, Limits(kld_mean=0.01)).kld_mean == 0.01
    loose = target_of(ExportSection(target="cpu-auto", auto=AutoSection(kld_mean=0.2, size_mb=9)))
    assert loose.limits.kld_mean == 0.05
    recipe = Recipe.model_validate(
        {"model": {"id": "m"}, "data": {"train": "t"}, "export": {"target": "cpu-auto", "auto": {"kld_mean": 0.02}}}
    )
    assert with_target_limits(recipe).verify.limits.kld_mean == 0.02


@pytest.mark.parametrize("wrong", ["{", "[1]", '[{"name": "a", "size_mb": "b", "kld_mean": 1}]'])
def test_broken_points_are_refused_before_anything_is_measured(tiny_model: Path, tmp_path: Path, wrong: str) -> None:
    (tmp_path / "points.json").write_text(wrong, encoding="utf-8")
    points = AutoSection(points=str(tmp_path / "points.json"))
    with pytest.raises(InputError, match="list of measured points"):
        find(tiny_model, points, _rows(), _rows(2), 128, tmp_path)
    (tmp_path / "points.json").write_text(json.dumps([{"name": "a", "size_mb": 1, "kld_mean": 0.1}]), encoding="utf-8")
