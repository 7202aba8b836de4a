"""Tuning: what is kept, what is not, what becomes of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from artifacts import tiny_artifact  # noqa: F401
from conftest import edgetune
from edgetune.cli.tune import _net
from edgetune.errors import EdgetuneError
from edgetune.runtime import tune as module
from edgetune.runtime.artifact import open_artifact
from edgetune.runtime.bench import process
from edgetune.runtime.bench.workloads import Workload
from edgetune.runtime.profile import Settings, find
from edgetune.runtime.tune import Ratios, Trial, better, trials

SHORT = ("--prompt-tokens", "8", "--new-tokens", "2", "--warmup", "0", "--repetitions", "1", "--loads", "0")


def ratios(*values: float, same: bool = True) -> Ratios:
    return Ratios(list(values), list(values), list(values), same)


def test_only_what_is_better_beyond_the_noise_is_kept():
    assert better(ratios(1.05, 1.06, 1.04, 1.05, 1.2), None)
    assert not better(ratios(0.9, 1.3, 0.95, 1.2, 1.02), None)  # better in the median, by noise
    assert not better(ratios(1.005, 1.006, 1.004, 1.005), None)  # sure, and not worth it
    assert not better(ratios(1.5, 1.5, 1.5, 1.5, same=False), None)  # other tokens


def test_a_busy_machine_counts_as_much_as_a_quiet_one():
    assert better(ratios(0.98, 0.98, 0.98, 0.98), ratios(2.0, 2.1, 1.9, 2.0))
    assert not better(ratios(1.05, 1.05, 1.05, 1.05), ratios(0.7, 0.7, 0.7, 0.7))
    assert not better(ratios(1.1, 1.1, 1.1, 1.1), ratios(1.1, 1.1, 1.1, 1.1, same=False))


def test_trials_change_one_thing_of_the_best(tiny_artifact: Path):  # noqa: F811
    best = Settings(2, {"enable_mem_pattern": False}, 128)
    spin = Trial("", (("session.intra_op.allow_spinning", "0"),))
    assert spin.on(best) == Settings(2, {"enable_mem_pattern": False, "session.intra_op.allow_spinning": "0"}, 128)
    assert Trial("", threads=1).on(best) == Settings(1, best.session, 128)
    names = [trial.name for trial in trials(open_artifact(tiny_artifact))]
    assert len(set(names)) == len(names) and "threads do not spin" in names


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few and short rounds, of two trials: one that nobody may keep, and one that cannot run."""
    monkeypatch.setattr(module, "_PAIRS", 3)
    monkeypatch.setattr(module, "_STATE_S", 600)
    monkeypatch.setattr(module, "_ROUND_S", 600)
    monkeypatch.setattr(module, "_QUIET", (40, 20))
    wrong = Trial("wrong", (("graph_optimization_level", "none such"),))
    same = Trial("same", (("session.intra_op.allow_spinning", "1"),), under_load=True)
    monkeypatch.setattr(module, "trials", lambda artifact: [same, wrong])


def test_a_whole_run(tiny_artifact: Path, quick: None, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    artifact = open_artifact(tiny_artifact)
    monkeypatch.setattr(module, "better", lambda quiet, loaded: quiet.same_tokens and loaded is not None)
    monkeypatch.setattr(module, "_HOPELESS", 0)
    monkeypatch.setattr(module, "_GAIN", 10)  # however slow a busy machine makes a trial, it is measured to its end
    made = module.tune(artifact, seconds=600)
    same, wrong = made.measured["trials"]
    assert same["kept"] and same["loaded"]["rounds"] == same["quiet"]["rounds"] == 3
    assert not wrong["kept"] and "does not run here" in wrong["note"] and "none such" in wrong["note"]
    faster = made.measured["net"] > 1  # of a busy machine nothing is sure
    assert made.settings.session == ({"session.intra_op.allow_spinning": "1"} if faster else {})
    assert made.settings.row_costs is not None and made.settings.row_costs.keys() == {1, 2, 4, 8, 16}
    assert made.measured["guessing"] == {"differ": 0, "of": 3 * (20 + 20 + 16 + 16)}  # float32 rounds little
    for state in ("quiet", "loaded"):
        for name in ("before", "after"):
            assert made.measured[name][state]["decode_tokens_per_s"] > 0
    assert not [child for child in psutil.Process().children() if "bench.worker" in " ".join(child.cmdline())]


class Pretended:
    """A worker whose times are made up: a round takes so many ms a token."""

    peak_rss_mb = 1.0

    def __init__(self, ms: float = 10.0) -> None:
        self.ms, self.rounds, self.asked = ms, 0, []

    def __enter__(self) -> Pretended:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def prepare(self, work: Workload, warmup: int, repetitions: int) -> int:
        self.work = work
        self.asked.append(work)
        return warmup + repetitions

    def round(self, number: int) -> list[dict[str, Any]]:
        self.rounds += 1
        itl = [self.ms] * (self.work.new - 1)
        return [{"ttft_ms": self.ms * self.work.prompt, "itl_ms": itl, "tokens": [1]}]

    def rows(self, number: int, counts: tuple[int, ...]) -> dict[str, Any]:
        self.rounds += 1
        return {"ms": [self.ms] * len(counts), "differ": 0, "of": 10}


ARTIFACT: Any = SimpleNamespace(
    max_length=512, prefill_tokens=64, name="a", path=Path("a"), manifest={"outputs": {}}, config={}
)


def test_a_slow_model_is_asked_for_little():
    work, slow = module._Work(ARTIFACT, 0.001, False), Pretended(200.0)  # 35 s for a whole round
    work.size(slow)
    assert max(asked.prompt + asked.new for asked in slow.asked) < 60
    costs, guessing = work.row_costs(slow)
    assert slow.work.new == 16 and slow.work.prompt <= work.quiet.prompt
    assert costs is not None and guessing == {"differ": 0, "of": 10}  # one round: the time is up
    before = slow.rounds
    rates, net = work.before_and_after(slow, slow)
    assert slow.rounds == before + 1 and rates["before"] == rates["after"] and net is None


@pytest.mark.parametrize(("ms", "net"), [(8.0, 1.25), (12.5, 0.8)])
def test_what_is_no_better_in_the_end_is_not_kept(ms: float, net: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        module._Work, "start", lambda self, settings, stack: Pretended(10 if settings == Settings() else ms)
    )
    monkeypatch.setattr(module, "trials", lambda artifact: [Trial("one", threads=1)])
    monkeypatch.setattr(module, "better", lambda quiet, loaded: True)
    made = module.tune(ARTIFACT, under_load=False)
    assert made.measured["net"] == net and made.measured["trials"][0]["kept"]
    assert made.settings.threads == (1 if net > 1 else None) and made.settings.row_costs is not None
    assert ("plain settings are kept" in _net(net)) == (net < 1) and f"{net:.2f} times" in _net(net)


def test_where_the_time_is_up_the_rest_is_named(tiny_artifact: Path, quick: None):  # noqa: F811
    made = module.tune(open_artifact(tiny_artifact), seconds=0.001, under_load=False)
    assert [row["note"] for row in made.measured["trials"]] == ["not measured: the time was up"] * 2
    assert made.settings.session == {} and "loaded" not in made.measured["after"]


def test_a_process_that_dies_is_told_of(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    code = "import sys; print('no such luck', file=sys.stderr); sys.exit(7)"
    monkeypatch.setattr(process, "_COMMAND", (sys.executable, "-c", code))
    with pytest.raises(EdgetuneError, match=r"exit code 7\)\n  no such luck"):
        module.tune(open_artifact(tiny_artifact))


def test_command_line(tiny_artifact: Path, tmp_path: Path):  # noqa: F811
    out = tmp_path / "profile.json"
    nothing = edgetune("tune", str(tiny_artifact), "--show")
    assert nothing.returncode == 2 and "no device profile" in nothing.stderr
    done = edgetune("tune", str(tiny_artifact), "--seconds", "5", "--no-stress", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "threads do not spin" in done.stdout and "before" in done.stdout and "--forget" in done.stderr
    again = tmp_path / "again.json"
    shown = edgetune("tune", str(tiny_artifact), "--show", "--json", "--out", str(again))
    assert again.read_text() == out.read_text()
    kept = json.loads(shown.stdout)
    assert {**kept, "file": None} == {**json.loads(out.read_text()), "file": None}
    bench = edgetune(
        "bench", str(tiny_artifact), "--json", "--prompt-tokens", "8", "--new-tokens", "2", "--warmup", "0"
    )
    assert json.loads(bench.stdout)["device_profile"]["row_costs"] == kept["settings"]["row_costs"]
    plain = edgetune("bench", str(tiny_artifact), "--json", *SHORT, "--no-profile")
    assert json.loads(plain.stdout)["device_profile"] is None
    gone = edgetune("tune", str(tiny_artifact), "--forget", "--json")
    assert json.loads(gone.stdout) == {"forgotten": True, "file": kept["file"]}
    assert "there was no device profile" in edgetune("tune", str(tiny_artifact), "--forget").stderr
    assert find(open_artifact(tiny_artifact)) == (None, None)


def test_bad_input(tiny_artifact: Path, tmp_path: Path):  # noqa: F811
    both = edgetune("tune", str(tiny_artifact), "--show", "--forget")
    assert both.returncode == 2 and "exclude" in both.stderr
    written = edgetune("tune", str(tiny_artifact), "--forget", "--out", str(tmp_path / "p.json"))
    assert written.returncode == 2 and "--out: does not go with --forget" in written.stderr
    folder = edgetune("tune", str(tiny_artifact), "--out", str(tmp_path))
    assert folder.returncode == 2 and "is a folder" in folder.stderr
    assert edgetune("tune", str(tmp_path)).returncode == 2
