"""lm-evaluation-harness on folders with models."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from artifacts import tiny_artifact  # noqa: F401 - a fixture
from conftest import ROOT, edgetune, write_jsonl
from edgetune.errors import InputError
from edgetune.export import evaluate as module

TASK = """
task: own
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: {kind}
test_split: test
doc_to_text: "The capital of {{{{country}}}} is"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: {metric}}}]
"""


def test_a_missing_harness_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("edgetune.errors.find_spec", lambda name: None if name == "lm_eval" else object())
    with pytest.raises(InputError, match=r"^lm_eval is not installed(.|\n)*edgetune\[evaluate\]"):
        module.evaluate(tmp_path, None, ["capitals"])


def test_the_shipped_questions_are_whole() -> None:
    rows = [json.loads(line) for line in (ROOT / "recipes/tasks/capitals.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == len({row["country"] for row in rows}) == 40
    assert all(len(set(row["choices"])) == 4 and 0 <= row["answer"] < 4 for row in rows)
    assert {row["answer"] for row in rows} == {0, 1, 2, 3}


def test_both_models_are_scored_alike(
    tiny_artifact: Path,  # noqa: F811
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    rows = [{"country": f"c{n}", "choices": ["one two", "three", "four"], "answer": n % 3} for n in range(6)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    task = tmp_path / "own.yaml"
    task.write_text(TASK.format(data=data, kind="multiple_choice", metric="acc"))
    out = tmp_path / "results.json"
    found = module.evaluate(tiny_artifact, tiny_model, [str(task)], out=out)
    numbers = found["tasks"]["own"]["metrics"]["acc"]
    assert found["tasks"]["own"]["rows"] == 6 and json.loads(out.read_text()) == found
    assert numbers["values"][0] == numbers["values"][1] and numbers["difference_stderr"] == 0.0  # a float32 artifact
    columns, lines = module.table(found)
    assert len(columns) == len(lines[0]) == 6 and found["adapters"] == [None, None]
    monkeypatch.syspath_prepend(str(ROOT / "tests/models"))
    from tiny_gguf import write_gguf

    beside = module.evaluate(tiny_model, write_gguf(tiny_model, tmp_path / "m.gguf"), [str(task)], limit=2)
    assert module.table(beside)[0][3:5] == (tiny_model.name, "m.gguf")
    with pytest.raises(InputError, match="no such task: nowhere"):
        module._load(["nowhere"], None, None)


def test_scores_are_those_of_transformers(tiny_model: Path) -> None:
    pytest.importorskip("lm_eval")
    import torch

    from edgetune import progress
    from edgetune.export.harness import Folder
    from edgetune.models import load_model

    context, continuation = "What is the name of the river", " there? The Seine."
    with progress.task("test") as bar:
        ours = Folder(tiny_model, bar)
        before, after = ours._encode_pair(context, continuation)
        ((score, greedy),) = ours._loglikelihood_tokens([(None, before, after)])
        long = ours._loglikelihood_tokens([(None, before * 100, after)])[0][0]
        request = type("Request", (), {"args": (context, {"until": ["\n"], "max_gen_toks": 5})})
        answer = ours.generate_until([request])[0]
    model = load_model(tiny_model, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.tensor([before + after])).logits[0].log_softmax(-1)
        made = model.generate(torch.tensor([before]), max_new_tokens=5, do_sample=False)[0, len(before) :]
    wanted = sum(float(logits[len(before) - 1 + n, token]) for n, token in enumerate(after))
    assert score == pytest.approx(wanted, abs=1e-3) and math.isfinite(long) and not greedy
    assert answer == ours.tokenizer.decode(made, skip_special_tokens=True).partition("\n")[0]


def test_what_holds_no_model_is_exit_2(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    done = edgetune("evaluate", tmp_path, "--tasks", "capitals")
    assert done.returncode == 2 and "is not an artifact" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("{{country}}", "{{nothing}}", "a task does not fit its data: .*nothing"),
        ("output_type: multiple_choice", "output_type: frob", "a task cannot be used: .*output_type 'frob'"),
        ("test_split: test", "test_split: [", r"own.yaml: not valid YAML: .*line \d+"),
    ],
)
def test_tasks_that_are_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, said: str) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    data = write_jsonl(tmp_path / "rows.jsonl", [{"country": "c", "choices": ["one", "two"], "answer": 0}])
    task = tmp_path / "own.yaml"
    task.write_text(TASK.format(data=data, kind="multiple_choice", metric="acc").replace(old, new))
    with pytest.raises(InputError, match=said):
        module._load([str(task)], None, None)
