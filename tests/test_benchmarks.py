"""The arithmetic and the words of benchmarks/train_speed.py, on made-up runs; nothing is trained."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT

SCRIPT = ROOT / "benchmarks" / "train_speed.py"


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))


def run(
    side: str, round: int, speed: float, peak: float = 1000.0, loss: float | None = 1.8, others: float = 0.0
) -> Any:
    from _train_speed_table import Run

    return Run(side, round, 10, 10_000, 10_000 / speed, peak, 60.0, 100.0, others, loss)


def three_rounds() -> list[Any]:
    """Ours 400, 300, 500 tokens/s; as it comes 50, 50, 100; tuned 200, 100, 100."""
    speeds = {"edgetune": (400, 300, 500), "trl": (50, 50, 100), "trl-tuned": (200, 100, 100)}
    peaks = {"edgetune": 1200.0, "trl": 4000.0, "trl-tuned": 1000.0}
    losses = {"edgetune": (1.80, 1.79, 1.81), "trl": (1.80, 1.80, 1.79), "trl-tuned": (1.78, 1.795, 1.77)}
    return [
        run(side, round, speeds[side][round], peaks[side], losses[side][round]) for side in speeds for round in range(3)
    ]


def test_medians_and_ratios_round_by_round() -> None:
    from _train_speed_table import summary

    found = summary(three_rounds(), limit=800.0)
    assert found["edgetune"]["tokens_per_s"] == pytest.approx(400)
    assert found["edgetune"]["tokens_per_s_range"] == pytest.approx((300, 500))
    assert found["edgetune"]["fraction"] == pytest.approx(0.5)
    assert found["edgetune"]["speedup"] == pytest.approx(1)
    assert found["trl"]["speedup"] == pytest.approx(6)  # of 8, 6 and 5; the ratio of the medians would be 8
    assert found["trl-tuned"]["speedup"] == pytest.approx(3)  # of 2, 3 and 5
    assert found["trl"]["memory"] == pytest.approx(0.3)
    assert found["trl-tuned"]["loss"] == pytest.approx(1.78)
    assert found["trl-tuned"]["loss_range"] == (1.77, 1.795)


def test_each_goal_is_judged_alone() -> None:
    from _train_speed_table import goals, summary

    said = goals(summary(three_rounds(), limit=500.0))
    assert [met for met, _ in said] == [True, True, True, True, False, False, True]
    assert "6.00 times as fast as trl" in said[0][1]
    assert "120% of the memory of trl-tuned" in said[4][1]
    assert "1.8000, trl-tuned 1.7700 to 1.7950" in said[5][1]
    assert "0.80 of the arithmetic limit" in said[6][1]


def test_without_ours_there_are_no_ratios_and_no_goals() -> None:
    from _train_speed_table import goals, summary, table

    found = summary([run("trl", 0, 50.0, loss=None)], limit=500.0)
    assert "speedup" not in found["trl"] and goals(found) == []
    assert "0.10" in table(found, {"trl": "TRL as it comes"})


def test_the_table_is_markdown_of_equal_columns() -> None:
    from _train_speed_table import summary, table

    lines = table(summary(three_rounds(), limit=800.0), {"trl": "TRL as it comes"}).splitlines()
    assert len({len(line) for line in lines}) == 1 and len({line.count("|") for line in lines}) == 1
    assert lines[2].split("|")[2].strip() == "400 (300 to 500)"
    assert lines[3].startswith("| TRL as it comes") and "6.00 times" in lines[3] and "30%" in lines[3]


def test_all_that_is_printed() -> None:
    from _train_speed_table import goals, summary, text

    runs = [run("edgetune", 0, 400.0), run("trl", 0, 100.0, others=0.4)]
    found = summary(runs, limit=561.0)
    rows = {"rows": 80, "passes": 1, "tokens": 10_000, "learned_tokens": 4000, "shortest": 77, "longest": 227}
    said = text(
        {
            "date": "2026-01-01",
            "cpu": {"model": "A processor", "usable_cores": 2, "instruction_sets": ["avx2"]},
            "versions": {"torch": "2.13.0", "trl": "1.16.0"},
            "work": {
                "model_id": "a-model",
                "parameters": 134_515_008,
                "train": rows,
                "validation": {**rows, "rows": 32, "learned_tokens": 1818},
                "batch_size": 8,
                "rank": 16,
                "learning_rate": 2e-4,
            },
            "runs": [{"round": r.round, "others": r.others} for r in runs],
            "summary": found,
            "goals": goals(found),
            "base_loss": 1.8814,
            "gflops": 302.0,
            "products_gflops": {"bfloat16 4096 x 4096 x 4096": 302.0, "float32 4096 x 4096 x 4096": 150.0},
            "limit": 561.3,
        },
        {},
    )
    for words in (
        "2026-01-01, A processor, 2 cores (avx2); torch 2.13.0, trl 1.16.0.",
        "base: 1.8814",
        "in 1 pass over 80 rows",
        "learning rate 0.0002; 1 round.",
        "is 561 tokens/s",
    ):
        assert words in said
    assert "Other programs kept up to 0.4 cores busy" in said
    assert "NOT MET: 4.00 times as fast as trl (goal: 6)" in said


def test_the_limit_is_four_operations_a_parameter_and_token() -> None:
    from _train_speed_table import limit_tokens_per_s

    assert limit_tokens_per_s(134_515_008, 302.0) == pytest.approx(561.3, abs=0.1)


def test_rows_are_whole_steps_of_about_the_tokens_wanted() -> None:
    from _train_speed_tools import choose

    lengths = [100] * 30 + [5000]
    rows, passes = choose(lengths, tokens=1000, longest=1024, batch_size=8)
    assert (len(rows), passes, len(set(rows))) == (16, 1, 16) and 30 not in rows
    assert choose(lengths, 1000, 1024, 8) == (rows, passes)
    assert choose(lengths, tokens=4800, longest=1024, batch_size=8)[1] == 2  # 24 rows twice
    assert choose(lengths, tokens=10, longest=50, batch_size=8) == ([], 1)


def test_every_trl_side_takes_the_same_rows_a_step() -> None:
    from _train_speed_run import BATCH, SIDES

    for side in SIDES.values():
        if side.sft:
            assert side.sft["per_device_train_batch_size"] * side.sft["gradient_accumulation_steps"] == BATCH
    assert [name for name, side in SIDES.items() if side.default] == ["edgetune", "trl", "trl-tuned"]


def test_our_recipe_is_valid(tmp_path: Path) -> None:
    from _train_speed_run import recipe

    from edgetune.recipe import Recipe

    job = {"model": "m", "folder": tmp_path, "train": {"passes": 2}, "learning_rate": 1e-4}
    found = Recipe.model_validate(recipe(job, 43, tmp_path / "runs"))
    assert (found.train.epochs, found.train.learning_rate, found.train.warmup, found.seed) == (2, 1e-4, 0, 43)
    assert (found.train.rank, found.train.batch_size) == (16, 8)


def test_a_run_over_other_tokens_is_refused() -> None:
    from _train_speed_run import Used, _checked

    from edgetune.errors import EdgetuneError

    job = {"steps": 10, "train": {"tokens": 1000}}
    assert _checked("trl", job, 0, 10, 1000, 5.0, Used(9, 9, 9, 0)).tokens_per_s == 200
    with pytest.raises(EdgetuneError, match="not comparable"):
        _checked("trl", job, 0, 10, 990, 5.0, Used(9, 9, 9, 0))


def test_help_and_refusals_come_without_training() -> None:
    def said(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, check=False, timeout=60)

    helped = said("--help")
    assert helped.returncode == 0 and "--only" in helped.stdout and "trl-tuned" in helped.stdout
    assert said("--rounds", "0").returncode == 2
    assert "is not empty" in said("--keep", str(SCRIPT.parent)).stderr
    missing = said("--rows", "nowhere.jsonl")
    assert missing.returncode == 2 and "no such file: nowhere.jsonl" in missing.stderr


def test_a_process_is_measured_and_one_that_fails_is_told_with_its_last_words(tmp_path: Path) -> None:
    from _train_speed_run import run as start

    from edgetune.errors import EdgetuneError

    # From a small process, as the benchmark is one: a child's peak begins with the memory of the process that starts it.
    measure = (
        "import sys; from pathlib import Path; from _train_speed_run import run;"
        "used = run([sys.executable, '-c', 'x = bytearray(b\"x\" * 50_000_000)'], Path('log'), Path('.'));"
        "print(used.peak_mb, used.wall_s)"
    )
    env = {**os.environ, "PYTHONPATH": str(SCRIPT.parent)}
    said = subprocess.run([sys.executable, "-c", measure], cwd=tmp_path, env=env, capture_output=True, text=True)
    peak_mb, wall_s = map(float, said.stdout.split())
    assert 50 < peak_mb < 500 and wall_s > 0, said.stderr
    with pytest.raises(EdgetuneError, match="ended badly"):
        start([sys.executable, "-c", "raise SystemExit('ended badly')"], tmp_path / "log", tmp_path)
