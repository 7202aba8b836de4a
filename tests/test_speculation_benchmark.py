"""benchmarks/speculation.py: the profile that it needs, and what it says of the goals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from artifacts import tiny_artifact  # noqa: F401
from conftest import ROOT


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_guessing_ahead_is_tuned_before_it_is_measured(
    tiny_artifact: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import speculation

    from edgetune.errors import EdgetuneError
    from edgetune.runtime import tune
    from edgetune.runtime.artifact import open_artifact
    from edgetune.runtime.hardware import cpu
    from edgetune.runtime.profile import Profile, Settings, artifact_digest, engine, find, profile_path

    artifact = open_artifact(tiny_artifact)
    tuned: list[dict[int, float] | None] = []

    def stand_in(found: Any) -> Profile:
        tuned.append(costs)
        return Profile(artifact_digest(found), "tiny", cpu(), engine(), Settings(row_costs=costs), {})

    monkeypatch.setattr(tune, "tune", stand_in)
    costs: dict[int, float] | None = {1: 1.0, 2: 1.2}
    speculation.tuned(artifact)
    assert "there is no device profile: tuning" in capsys.readouterr().err and find(artifact)[0] is not None
    speculation.tuned(artifact)
    assert tuned == [costs]  # once
    profile_path(artifact).unlink()
    costs = None
    with pytest.raises(EdgetuneError, match="no costs of guessing"):
        speculation.tuned(artifact)
    profile_path(artifact).unlink()


def test_goals_of_guessing_ahead() -> None:
    from speculation import goals

    factors = {"copying": 1.0, "extraction": 2.6, "code edits": 2.4, "open writing": 0.98}
    said = goals([{"kind": kind, "adaptive": {"factor": factor}} for kind, factor in factors.items()])
    assert [met for met, _ in said] == [True, False, True]
    assert said[1][1] == "code edits: 2.40 times plain decoding; goal: 2.5 times"
    assert not goals([{"kind": "open writing", "adaptive": {"factor": 0.96}}])[0][0]
