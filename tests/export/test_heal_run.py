"""`edgetune heal RUN`: the artifact is made again, healed, verified; nothing before it is touched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import edgetune, write_jsonl
from edgetune import recipe_file
from edgetune.errors import InputError
from edgetune.pipeline import Pipeline
from edgetune.run import read_manifest
from edgetune.standalone import heal_run

RECIPE = """
model: {{id: {model}}}
data: {{train: rows.jsonl, validation: {{auto: 0.25}}}}
train: {{rank: 4, learning_rate: 0.01, batch_size: 8, evaluations: 1, samples: 0}}
export: {{target: {project}/target.yaml, max_length: 128}}
runs_dir: {project}/runs
verify: {{rows: 3, golden_tokens: 4, limits: {{kld_mean: 99, kld_p99: 99, top1_agreement: 0.01, perplexity_ratio: 99}}}}
bench: {{prompt_tokens: 16, new_tokens: 4}}
"""

TARGET = """
description: Four bits.
needs: A CPU.
provider: cpu
precision: int4
quantization: {method: min_max, bits: 4, block_size: 32, modules: {lm_head: {bits: 4, block_size: 16}}}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A run that has come as far as the merged model."""
    project = tmp_path_factory.mktemp("heal")
    texts = [f"What is {n} plus {n}? It is {2 * n}, and {n} times {n} is {n * n}." for n in range(64)]
    write_jsonl(project / "rows.jsonl", [{"text": text} for text in texts])
    (project / "target.yaml").write_text(TARGET)
    (project / "tiny.yaml").write_text(RECIPE.format(model=tiny_model, project=project))
    Pipeline(recipe_file.load(str(project / "tiny.yaml"))).run(until="merge")
    return project / "runs/tiny"


def test_a_run_is_healed_and_verified(run: Path) -> None:
    before = {name: read_manifest(run / name) for name in ("data", "adapter", "merged")}
    result = heal_run(run, 16, ["export.heal.learning_rate=4e-3", "export.heal.step_tokens=400"])
    assert list(result.done) == ["export", "verify"] and result.missed is None
    healed = result.reports["export"]["quantization"]["heal"]
    assert healed["steps_done"] == 16 and healed["best_step"] > 0
    assert healed["held_out"]["after"]["kld_mean"] < healed["held_out"]["before"]["kld_mean"]
    assert {name: read_manifest(run / name) for name in before} == before
    assert json.loads((run / "recipe.json").read_text())["export"]["heal"]["steps"] == 16
    assert not (run / ".healing").exists()


def test_what_cannot_be_healed_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a run"):
        heal_run(tmp_path, 4)
    with pytest.raises(InputError, match="cpu-fp32 is no target of edgetune's own quantization"):
        heal_run(run, 4, ["export.target=cpu-fp32"])
    (run / "merged/manifest.json").rename(run / "merged/gone.json")
    with pytest.raises(InputError, match="the run lacks `merge`"):
        heal_run(run, 4)
    said = edgetune("heal", run, "--steps", "4", "export.heal.rank=-1")
    assert said.returncode == 2 and "export.heal.rank" in said.stderr and "Traceback" not in said.stderr


def test_a_run_that_was_not_trained_through_the_grids_is_not_healed_as_if_it_were(run: Path) -> None:
    with pytest.raises(InputError, match="was not trained through the grids"):
        heal_run(run, 4, ["train.quantization_aware=true"])
