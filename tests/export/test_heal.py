"""Healing: it starts at what it is given, stays on the grids, comes nearer to the merged model, and goes on where it stopped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from edgetune.data.batch import Encoded
from edgetune.errors import InputError
from edgetune.export.quantize import heal_loss
from edgetune.export.quantize.calibrate import quantize_model
from edgetune.export.quantize.grid import Grid, Quantized
from edgetune.export.quantize.heal import heal
from edgetune.export.quantize.heal_layers import Matrix, Place, as_int8, install
from edgetune.export.quantize.heal_student import Student
from edgetune.export.quantize.plan import Plan
from edgetune.export.quantize.rtn import min_max
from edgetune.export.quantize.smooth import round_inputs
from edgetune.models import load_model
from edgetune.recipe import HealSection

PLAN = Plan(
    Grid(4, 32, True),
    {"v_proj": Grid(8, 32), "model.layers.1.mlp.up_proj": Grid(8, activations="int8"), "lm_head": Grid(4, 16)},
    "min_max",
    most_error=float("inf"),
)


def _rows(count: int = 24, length: int = 60) -> list[Encoded]:
    made = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 40, (count, length), generator=made).tolist()  # few words: what is learned holds elsewhere
    return [Encoded(one, [place >= 20 for place in range(length)]) for one in ids]


def _quantized(folder: Path, plan: Plan = PLAN) -> tuple[dict[str, Quantized], dict[str, torch.Tensor]]:
    found: dict[str, Quantized] = {}
    floats: dict[str, torch.Tensor] = {}
    quantize_model(folder, plan, [row.ids for row in _rows()], found.__setitem__, keep_float=floats.__setitem__)
    return found, floats


def _kl(folder: Path, found: dict[str, Quantized], floats: dict[str, torch.Tensor], rows: Sequence[Encoded]) -> float:
    """Mean KL by plain transformers in float32, with weights as ONNX Runtime unpacks them (activations stay float)."""
    teacher = load_model(folder, dtype=torch.float32).eval()
    student = load_model(folder, dtype=torch.float32).eval()
    for name, value in floats.items():
        student.get_parameter(name).data.copy_(value)
    for name, matrix in found.items():
        student.get_submodule(name).weight.data.copy_(matrix.dequantize())
    ids = torch.tensor([row.ids for row in rows])
    with torch.no_grad():
        wanted, is_now = (model(ids).logits[:, :-1].log_softmax(-1) for model in (teacher, student))
    return float((wanted.exp() * (wanted - is_now)).sum(-1).mean())


@pytest.mark.parametrize("rank", [0, 4])
def test_the_healed_model_is_nearer_to_the_merged_one_on_the_same_grids(tiny_model: Path, rank: int) -> None:
    found, floats = _quantized(tiny_model)
    assert floats  # smoothed for the int8 activations
    rows = _rows()
    how = HealSection(steps=24, step_tokens=600, rank=rank, learning_rate=4e-3, rank_learning_rate=2e-2)
    healed = heal(tiny_model, found, rows, how, seed=1, floats=floats)
    assert {name: q.grid for name, q in healed.found.items()} == {name: q.grid for name, q in found.items()}
    assert all(
        (now.zeros is None) == (was.zeros is None)
        and now.codes.dtype == torch.uint8
        and now.codes.max() <= now.grid.top
        for now, was in ((healed.found[name], found[name]) for name in found)
    )
    seen, unseen = rows[:8], _rows(40)[24:]
    assert _kl(tiny_model, healed.found, floats, seen) < 0.95 * _kl(tiny_model, found, floats, seen)
    assert _kl(tiny_model, healed.found, floats, unseen) < _kl(tiny_model, found, floats, unseen)
    looks = healed.report["held_out"]
    assert looks["after"]["kld_mean"] < looks["before"]["kld_mean"]
    same = all(bool((healed.found[name].codes == found[name].codes).all()) for name in found)
    assert same == (rank == 0)


def test_before_the_first_step_the_codes_are_those_that_were_given() -> None:
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(1))
    found = min_max(weight, Grid(4, 32, True))
    found.codes = (found.codes.int() + torch.randint(-2, 3, found.codes.shape)).clamp(0, 15).to(torch.uint8)
    matrix = Matrix(found, weight, 8)
    assert matrix.quantized().codes.equal(found.codes)
    out = torch.empty_like(weight)
    matrix.write(out)
    torch.testing.assert_close(out, found.dequantize())


def test_slopes_are_those_of_autograd() -> None:
    made = torch.Generator().manual_seed(1)
    weight, slope = torch.randn(24, 64, generator=made), torch.randn(24, 64, generator=made)
    matrix = Matrix(min_max(weight, Grid(4, 32, True)), weight, 4, made)
    with torch.no_grad():
        for one in matrix.learns():
            one.add_(torch.randn(one.shape, generator=made) * 0.1)
    own = torch.empty_like(weight)
    matrix.write(own)
    codes = matrix.quantized().codes.view(24, 2, 32) - matrix.zeros[..., None]
    assert matrix.a is not None and matrix.b is not None
    through = (matrix.b @ matrix.a).view(24, 2, 32)
    through = through + (codes - through).detach()
    made_of = through * (matrix.scales * matrix.stretch.exp())[..., None]
    wanted = torch.autograd.grad((made_of.flatten(1) * slope).sum(), matrix.learns())
    for found, want in zip(matrix.slopes(slope, own), wanted, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


def test_a_tied_embedding_learns_from_both_its_uses(tiny_model: Path) -> None:
    """The slope of its scales is that of plain autograd through a whole model on the same weights."""
    found, _ = _quantized(tiny_model, Plan(Grid(8, 32), {"lm_head": Grid(4, 32)}, "min_max"))
    rows = torch.tensor([row.ids for row in _rows(2)])
    model = load_model(tiny_model, dtype=torch.float32).eval().requires_grad_(False)
    matrices = install(model, found, 0, 0, Place())
    hidden = model.base_model(input_ids=rows).last_hidden_state
    (hidden * 0.1).square().sum().backward()
    plain = load_model(tiny_model, dtype=torch.float32).eval().requires_grad_(False)
    for name, matrix in found.items():
        plain.get_submodule(name).weight.data.copy_(matrix.dequantize())
    weight = plain.get_input_embeddings().weight.requires_grad_(True)
    (plain.base_model(input_ids=rows).last_hidden_state * 0.1).square().sum().backward()
    wanted = (weight.grad * weight.detach()).view(384, 2, 32).sum(-1)
    torch.testing.assert_close(matrices["lm_head"].stretch.grad, wanted, rtol=1e-3, atol=1e-4)


def test_what_the_student_computes_is_what_is_handed_back(tiny_model: Path) -> None:
    """After learning, its score is that of plain transformers with the matrices that it gives, tied embedding included."""
    found, _ = _quantized(tiny_model, Plan(Grid(4, 32, True), {}, "min_max"))
    rows = [Encoded(row.ids, [False, *[True] * (len(row.ids) - 1)]) for row in _rows(4)]
    student = Student(tiny_model, rows, trust_remote_code=False)
    student.listen(range(4))
    student.become(found, {}, 2, 0)
    made = torch.Generator().manual_seed(4)
    student.load({name: torch.randn(value.shape, generator=made) * 0.1 for name, value in student.learned().items()})
    now = {name: matrix.quantized() for name, matrix in student.matrices.items()}
    assert any(not now[name].codes.equal(found[name].codes) for name in found)
    assert student.score(range(4))[0] == pytest.approx(_kl(tiny_model, now, {}, rows), rel=0.05)


@pytest.mark.parametrize("count", [1, 64, 150])
def test_the_divergence_and_its_slopes_are_those_of_plain_torch(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heal_loss, "_FLOATS", 384 * 100)  # several pieces
    made = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(count, 32, generator=made, requires_grad=True) for _ in range(2))
    weight = torch.randn(384, 32, generator=made)
    matrix = Matrix(min_max(weight, Grid(4, 32)), None, 0)
    own = matrix.found.dequantize().requires_grad_(True)
    heads = heal_loss.Heads(weight, own.detach(), None, matrix)
    found = heal_loss.divergence(student, teacher.detach(), heads)
    wanted = (teacher @ weight.t()).log_softmax(-1).detach()
    is_now = (student @ own.t()).log_softmax(-1)
    plain = (wanted.exp() * (wanted - is_now)).sum()
    torch.testing.assert_close(found, plain)
    slopes = torch.autograd.grad(found, (student, matrix.stretch))
    for_student, for_weight = torch.autograd.grad(plain, (student, own))
    torch.testing.assert_close(slopes[0], for_student, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(slopes[1], (for_weight * own.detach()).sum(-1, keepdim=True), rtol=1e-3, atol=1e-3)
    total, same = heal_loss.score(student.detach(), teacher.detach(), heads)
    assert total == pytest.approx(plain.item(), rel=1e-4)
    assert same == int((wanted.argmax(-1) == is_now.argmax(-1)).sum())


def test_int8_inputs_are_those_of_the_operator_row_by_row() -> None:
    lengths = [3, 5, 1]
    x = torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(2)) + 0.5
    place = Place()
    place.set(lengths)
    wanted = torch.cat([round_inputs(part) for part in x[0].split(lengths)])[None]
    torch.testing.assert_close(as_int8(x, place), wanted, rtol=0, atol=1e-5)
    place.set(None)
    torch.testing.assert_close(as_int8(x, place), round_inputs(x), rtol=0, atol=1e-5)


def test_the_same_seed_gives_the_same_bits_also_when_it_was_interrupted(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgetune.export.quantize import heal as module

    found, _ = _quantized(tiny_model, Plan(Grid(4, 32, True), {}, "min_max"))
    rows, how = _rows(), HealSection(steps=8, step_tokens=400, rank=2, learning_rate=4e-3)
    whole = heal(tiny_model, found, rows, how, seed=1)
    step, taken = Student.step, []

    def dies(self: Student, numbers: Sequence[int]) -> float:
        taken.append(numbers)
        if len(taken) == 6:
            raise KeyboardInterrupt
        return step(self, numbers)

    monkeypatch.setattr(module, "_CHECKPOINT_S", 0.0)
    monkeypatch.setattr(Student, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        heal(tiny_model, found, rows, how, seed=1, checkpoints=tmp_path)
    resumed = heal(tiny_model, found, rows, how, seed=1, checkpoints=tmp_path)
    assert len(taken) == 6 + 3  # five were done and kept
    for name, matrix in whole.found.items():
        assert matrix.codes.equal(resumed.found[name].codes)
        assert matrix.scales.equal(resumed.found[name].scales)


def test_what_makes_it_worse_is_not_kept(tiny_model: Path) -> None:
    found, _ = _quantized(tiny_model, Plan(Grid(8, 32), {}, "min_max"))
    healed = heal(tiny_model, found, _rows(), HealSection(steps=2, step_tokens=100, learning_rate=2.0), seed=1)
    assert healed.report["best_step"] == 0
    assert all(healed.found[name] is matrix for name, matrix in found.items())


def test_a_loss_that_is_no_number_stops_it(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, _ = _quantized(tiny_model, Plan(Grid(4, 32), {}, "min_max"))
    healed = heal(tiny_model, found, _rows(), HealSection(steps=6, step_tokens=100, learning_rate=1e6), seed=1)
    assert "not a number" in healed.report["stopped"]
    assert "not a number" in capsys.readouterr().err
    assert all(matrix.scales.isfinite().all() for matrix in healed.found.values())


def test_too_few_rows_and_unknown_matrices_are_refused(tiny_model: Path) -> None:
    found, _ = _quantized(tiny_model, Plan(Grid(8, 32), {}, "min_max"))
    with pytest.raises(InputError, match="3 rows of 180 tokens are too few"):
        heal(tiny_model, found, _rows(3), HealSection(steps=1), seed=1)
    silent = [Encoded(row.ids, [False] * len(row.ids)) for row in _rows()]
    with pytest.raises(InputError, match="only 0 rows"):
        heal(tiny_model, found, silent, HealSection(steps=1, positions="learned"), seed=1)
    with pytest.raises(InputError, match=r"no matrix model\.layers\.9"):
        heal(
            tiny_model, {**found, "model.layers.9.mlp.up_proj": found["lm_head"]}, _rows(), HealSection(steps=1), seed=1
        )


def test_rows_of_its_own_are_learned_from_too(tiny_model: Path) -> None:
    found, floats = _quantized(tiny_model)
    seen: list[int] = []
    real = Student.step

    def step(self: Student, numbers: Sequence[int]) -> float:
        seen.extend(numbers)
        return real(self, numbers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Student, "step", step)
        section = HealSection(steps=20, step_tokens=600, samples=5, learning_rate=4e-3)
        healed = heal(tiny_model, found, _rows(), section, seed=1, floats=floats)
    assert {number for number in seen if number >= 24} == set(range(24, 29))
    assert healed.report["samples"] == 5 and healed.report["held_out"]["after"]["kld_mean"] > 0
