"""Artifacts beside one another: what is taken from reports, what is Pareto-optimal, the table and the plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifacts import copy_of, tiny_artifact  # noqa: F401 - a fixture
from conftest import edgetune, write_jsonl
from edgetune.errors import InputError
from edgetune.export.compare import BETTER_LESS, Measure, _adopted, _mark, compare, plot, table
from edgetune.recipe import BenchSection
from edgetune.run import NOT_CONTENT, Work, read_manifest, seal

_DECIDE = ("size_mb", "kld_mean", "decode_tokens_per_s")


def _row(name: str, **values: Any) -> dict[str, Any]:
    return {"name": name, "path": name, **dict.fromkeys(BETTER_LESS), "error": None, **values}


def _run(artifact: Path, folder: Path, kld: float, decode: float, *, rows: int = 32) -> Path:
    """A run with an artifact and what its stages say of it."""
    from edgetune.files import digest

    run = folder / f"run-{kld}"
    run.mkdir()
    copy_of(artifact, run).rename(run / "artifact")
    (run / "recipe.json").write_text("{}")
    entries = read_manifest(run / "artifact")["outputs"]
    content = digest({name: entry["sha256"] for name, entry in entries.items() if name not in NOT_CONTENT})
    verified = {
        "kld_mean": kld, "kld_p99": 5 * kld, "top1_agreement": 0.95, "perplexity": {"ratio": 1 + kld},
        "rows": rows, "tokens": 10 * rows, "step": None,
    }  # fmt: skip
    benched = {
        "decode_tokens_per_s": {"p50": decode}, "prefill_tokens_per_s": {"p50": 9 * decode}, "peak_rss_mb": 300.0,
        "hardware": {"cpu": {"model": "a processor"}}, "threads": 2, "prompt_tokens": 64, "new_tokens": 16,
    }  # fmt: skip
    for stage, report in (("verify", verified), ("bench", benched)):
        (run / stage).mkdir()
        (run / stage / "report.json").write_text(json.dumps(report))
        seal(run / stage, Work(stage, {"artifact": content, "merged": "m", "data": "d"}, {}))
    return run


def test_reports_of_runs(tiny_artifact: Path, tmp_path: Path) -> None:  # noqa: F811
    better, worse = _run(tiny_artifact, tmp_path, 0.01, 90.0), _run(tiny_artifact, tmp_path, 0.2, 80.0)
    found = compare([better, worse / "artifact"], out=tmp_path / "out")
    assert [row["name"] for row in found["rows"]] == ["run-0.01", "run-0.2"]
    assert [row["pareto"] for row in found["rows"]] == [True, False] and found["notes"] == []
    first = found["rows"][0]
    assert (first["kld_mean"], first["kld_p99"], first["perplexity_ratio"]) == (0.01, 0.05, 1.01)
    assert (first["decode_tokens_per_s"], first["prefill_tokens_per_s"], first["peak_rss_mb"]) == (90, 810, 300)
    size = sum(path.stat().st_size for path in (better / "artifact").iterdir()) / 1e6
    assert first["size_mb"] == pytest.approx(size, abs=0.01)
    assert json.loads((tmp_path / "out/compare.json").read_text()) == found
    assert (tmp_path / "out/compare.png").read_bytes().startswith(b"\x89PNG")
    columns, rows = table(found)
    assert [row[0] for row in rows] == ["*", ""] and all(len(row) == len(columns) for row in rows)


def test_what_does_not_compare_is_said_and_what_is_of_another_artifact_is_not_taken(
    tiny_artifact: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    one, other = _run(tiny_artifact, tmp_path, 0.01, 90.0), _run(tiny_artifact, tmp_path, 0.2, 80.0, rows=5)
    assert compare([one, other])["notes"] == ["KL divergence does not compare: the rows differ"]
    path = other / "bench" / "manifest.json"
    path.write_text(path.read_text().replace(read_manifest(other / "bench")["inputs"]["artifact"], "another"))
    found = compare([one, other])
    assert found["rows"][1]["decode_tokens_per_s"] is None and found["rows"][1]["pareto"] is None
    assert found["notes"][-1] == "no speed is known of run-0.2"
    alone = compare([tiny_artifact])
    assert alone["rows"][0]["kld_mean"] is None and alone["rows"][0]["pareto"] is True  # by size
    with pytest.raises(InputError):
        compare([tmp_path / "nothing"])


@given(st.lists(st.tuples(*(st.sampled_from([1.0, 2.0, 3.0]) for _ in _DECIDE)), min_size=1, max_size=8))
def test_pareto_marks_what_nothing_beats(values: list[tuple[float, ...]]) -> None:
    rows = [_row(str(n), **dict(zip(_DECIDE, found, strict=True))) for n, found in enumerate(values)]
    _mark(rows)

    def beats(a: dict[str, Any], b: dict[str, Any]) -> bool:
        least = [(b[name] - a[name]) * (1 if BETTER_LESS[name] else -1) for name in _DECIDE]
        return min(least) >= 0 and max(least) > 0

    for row in rows:
        assert row["pareto"] == (not any(beats(other, row) for other in rows))
    assert any(row["pareto"] for row in rows)


def test_the_plot_takes_what_is_known(tmp_path: Path) -> None:
    plot([_row("nothing", size_mb=3.0, pareto=None)], tmp_path / "empty.png")
    plot([_row("exact", size_mb=3.0, kld_mean=0.0, pareto=True)], tmp_path / "one.png")
    assert all(file.stat().st_size > 5000 for file in tmp_path.glob("*.png"))


def test_measured_now_with_one_that_does_not_load(
    tiny_artifact: Path,  # noqa: F811
    tiny_model: Path,
    tiny_rows: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    builder, broken = copy_of(tiny_artifact, tmp_path / "a"), copy_of(tiny_artifact, tmp_path / "b")
    for folder in (builder, broken):
        for name in ("manifest.json", "golden.json"):
            (folder / name).unlink()
    broken = broken.rename(tmp_path / "b/broken")
    (broken / "model.onnx").write_text("no graph")
    rows = write_jsonl(tmp_path / "rows.jsonl", tiny_rows)
    how = Measure(tiny_model, rows, 3, bench=BenchSection(prompt_tokens=8, new_tokens=4, warmup=0, repetitions=1))
    found = compare([builder, broken, tiny_model], how)
    whole, failed, weights = found["rows"]
    assert whole["kld_mean"] < 1e-5 and whole["decode_tokens_per_s"] > 0 and whole["error"] is None
    assert "cannot load the graph" in failed["error"] and failed["kld_mean"] is None and failed["pareto"] is None
    assert weights["kld_mean"] == 0 and weights["decode_tokens_per_s"] is None
    assert sorted(path.name for path in builder.parent.iterdir()) == ["copy"]  # nothing is left beside it


def test_a_graph_of_another_tool_is_adopted_without_being_changed(tiny_artifact: Path, tmp_path: Path) -> None:  # noqa: F811
    from edgetune.runtime.artifact import open_artifact

    builder = copy_of(tiny_artifact, tmp_path)
    for name in ("manifest.json", "golden.json"):
        (builder / name).unlink()
    before = {path.name: path.read_bytes() for path in builder.iterdir()}
    adopted = open_artifact(_adopted(builder, tmp_path / "adopted"))
    assert adopted.max_length == 256 and adopted.stop_ids == (2,)
    assert {path.name: path.read_bytes() for path in builder.iterdir()} == before


def test_on_the_command_line(tiny_artifact: Path, tmp_path: Path) -> None:  # noqa: F811
    run = _run(tiny_artifact, tmp_path, 0.01, 90.0)
    done = edgetune("compare", run, tiny_artifact, "--out", tmp_path / "out")
    assert done.returncode == 0 and "compare.png" in done.stdout and "note: no speed is known" in done.stdout
    assert len(json.loads(edgetune("compare", run, "--json").stdout)["rows"]) == 1
    for wrong in (["--measure"], ["--rows", "3"]):
        refused = edgetune("compare", run, *wrong)
        assert refused.returncode == 2 and "--measure" in refused.stderr and "Traceback" not in refused.stderr
