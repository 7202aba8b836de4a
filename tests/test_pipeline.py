"""A whole run on the tiny model: what is redone, what is kept, what survives a kill -9."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from conftest import edgetune, write_jsonl
from edgetune import recipe_file
from edgetune.errors import InputError
from edgetune.export import preflight
from edgetune.files import TMP_PREFIX
from edgetune.pipeline import Pipeline
from edgetune.plan import plan
from edgetune.run import STAGES, Result, RunFolder, read_manifest
from edgetune.stage_work import missed
from edgetune.summary import as_json, summary

SETTINGS = """
model: {{id: {model}}}
data: {{train: rows.jsonl, validation: {{auto: 0.25}}}}
train: {{rank: 4, learning_rate: 0.01, epochs: 2, batch_size: 4, evaluations: 2}}
export: {{target: cpu-fp32, max_length: 128}}
verify: {{rows: 3, golden_tokens: 4}}
bench: {{prompt_tokens: 16, new_tokens: 4, warmup: 0, repetitions: 2}}
"""


@pytest.fixture
def project(tmp_path: Path, tiny_model: Path, tiny_rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe and its rows; the working folder of the test."""
    write_jsonl(tmp_path / "rows.jsonl", tiny_rows)
    (tmp_path / "tiny.yaml").write_text(SETTINGS.format(model=tiny_model))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*overrides: str, **how: Any) -> Result:
    return Pipeline(recipe_file.load("tiny.yaml", overrides)).run(**how)


def redone(result: Result) -> list[str]:
    return [stage for stage, why in result.done.items() if why]


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of everything that a run hands over, as its manifests have it."""
    found = {}
    for name in ("data", "adapter", "merged", "artifact"):
        for file, entry in read_manifest(folder / name)["outputs"].items():
            if file not in ("README.md", "report.json"):
                found[f"{name}/{file}"] = entry["sha256"]
    return found


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(f"{TMP_PREFIX}*")]


def test_a_run_and_what_is_redone_after_a_change(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run()
    assert redone(first) == list(STAGES)
    told = first.reports
    assert told["train"]["validation"]["after"]["loss"] < told["train"]["validation"]["before"]["loss"]
    assert told["merge"]["max_logprob_difference"] <= told["merge"]["tolerance"]
    assert told["verify"]["passed"] and told["verify"]["kld_mean"] < 1e-4 and told["verify"]["top1_agreement"] == 1
    assert all(text["divergent_at"] is None for text in told["verify"]["golden"])
    assert told["bench"]["decode_tokens_per_s"]["p50"] > 0
    assert leftovers(project) == []
    before = contents(project / "runs/tiny")

    assert redone(run()) == []
    assert redone(run("bench.repetitions=1")) == ["bench"]
    assert redone(run("bench.repetitions=1", "verify.rows=2")) == ["verify"]
    assert redone(run("train.rank=4", "export.max_length=64")) == ["export", "verify", "bench"]
    assert redone(run()) == ["export", "verify", "bench"]
    assert contents(project / "runs/tiny") == before

    (project / "runs/tiny/merged/config.json").write_text("{}")
    again = run()
    assert redone(again)[0] == "merge" and "not as it was written" in str(again.done["merge"])
    assert contents(project / "runs/tiny") == before

    def refuse(*_: Any, **__: Any) -> None:
        raise InputError("this model cannot have this target")

    with monkeypatch.context() as patch:  # an export that is refused leaves the last one whole, and what is said of it
        patch.setattr(preflight, "preflight", refuse)
        with pytest.raises(InputError, match="cannot have this target"):
            run("export.max_length=64")
    assert redone(run()) == []
    assert redone(run(first="verify")) == ["verify", "bench"]
    assert redone(run(until="merge")) == []
    assert redone(run(until="data", force=True)) == ["data"]
    with pytest.raises(InputError, match="lies after"):
        run(first="bench", until="train")

    card = (project / "runs/tiny/artifact/README.md").read_text()
    assert "gate | passed" in card and "tokens/s" in card
    rows = dict(summary(again))
    assert rows["next"] == "edgetune chat runs/tiny/artifact"
    assert json.loads(json.dumps(as_json(again)))["stages"]["data"]["redone"] is False


def test_a_missed_gate_keeps_the_artifact_and_says_so_each_time(project: Path) -> None:
    strict = ["verify.limits.kld_mean=1e-9", "export.target=cpu-int8"]
    for _ in range(2):
        found = run(*strict).missed
        assert found and found.exit_code == 3 and "kld_mean" in str(found) and "cpu-fp32" in str(found)
    folder = project / "runs/tiny"
    assert (folder / "artifact/model.onnx").is_file() and not (folder / "bench").exists()
    assert "NOT PASSED" in (folder / "artifact/README.md").read_text()
    from edgetune.runtime.artifact import open_artifact

    open_artifact(folder / "artifact")  # card and manifest were rewritten together
    shown = edgetune("run", "tiny.yaml", *strict, "--json")
    assert shown.returncode == 3 and json.loads(shown.stdout)["passed"] is False and "kld_mean" in shown.stderr


def test_an_artifact_over_its_size_is_missed_like_the_gate(tmp_path: Path) -> None:
    told = {
        "quantization": {"auto": {"limits": {"size_mb": 1.0}}},
        "size_mb": 1.5,
        "failures": ["size_mb 1.5 is over 1"],
    }
    error = missed("export", told, tmp_path)
    assert error and error.exit_code == 3 and "size_mb 1.5 is over 1" in str(error)
    assert missed("export", {**told, "failures": []}, tmp_path) is None


def test_what_turns_rows_into_tokens_is_part_of_training(project: Path, tiny_model: Path) -> None:
    assert redone(run(until="train")) == ["data", "train"]
    template = (tiny_model / "chat_template.jinja").read_text()
    (project / "other.jinja").write_text(template.replace("You help.", "You answer."))
    assert redone(run("model.chat_template=other.jinja", until="merge")) == ["data", "train", "merge"]
    assert (project / "runs/tiny/merged/chat_template.jinja").read_text() == (project / "other.jinja").read_text()
    assert redone(run("model.chat_template=other.jinja", "data.max_length=100", until="train")) == ["data", "train"]


def test_a_merge_alone_keeps_template_and_stop_token_of_the_training(project: Path, tiny_model: Path) -> None:
    """The template's end of turn is none of the model's stop ids here: the merged model must stop at it all the same."""
    import shutil

    other = Path(shutil.copytree(tiny_model, project / "other-model"))
    (other / "generation_config.json").write_text('{"eos_token_id": 0}')
    (project / "other.jinja").write_text(
        (tiny_model / "chat_template.jinja").read_text().replace("You help.", "You answer.")
    )
    run(f"model.id={other}", "model.chat_template=other.jinja", until="train")
    done = edgetune("merge", "runs/tiny/adapter", "--out", "alone", "--json")
    assert done.returncode == 0, done.stderr
    from edgetune.models import stop_ids

    assert stop_ids(project / "alone") == [0, 2]
    assert "You answer." in (project / "alone/chat_template.jinja").read_text()
    refused = edgetune("export", "alone", "--out", "runs/tiny/artifact")
    assert refused.returncode == 2 and "belongs to a run" in refused.stderr


def test_qlora_merges_onto_either_base_with_the_loss_of_both(project: Path) -> None:
    onto = {}
    for which in ("trained", "full-precision"):
        told = run("train.method=qlora", "train.max_steps=1", f"merge.onto={which}", until="merge").reports["merge"]
        assert told["onto"] == which and set(told["validation_loss"]) == {"trained", "full-precision"}
        onto[which] = read_manifest(project / "runs/tiny/merged")["outputs"]["model.safetensors"]["sha256"]
    assert onto["trained"] != onto["full-precision"]


def test_what_is_not_installed_is_said_before_anything_is_written(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgetune.train import quantize, trackers

    for module in (quantize, trackers):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    for override, said in [
        ("train.method=qlora", r"edgetune\[qlora\]"),
        ("train.optimizer=adamw_8bit", r"edgetune\[qlora\]"),
        ("train.trackers=[trackio]", r"edgetune\[trackers\]"),
    ]:
        with pytest.raises(InputError, match=said):
            run(override)
    assert not (project / "runs").exists()


@pytest.mark.slow
def test_kill_9_in_every_stage_then_the_same_result(project: Path) -> None:
    whole = edgetune("run", "tiny.yaml", "name=whole", "--until", "verify")
    assert whole.returncode == 0, whole.stderr
    command = [sys.executable, "-u", "-m", "edgetune", "run", "tiny.yaml", "name=killed", "--until", "verify"]
    killed = []
    for stage in ("data", "train", "merge", "export", "verify"):
        child = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        assert child.stderr
        for line in child.stderr:
            if re.match(rf"{stage}: (not done yet|its )", line):
                time.sleep({"data": 0.3, "train": 0.7, "merge": 0.1, "export": 0.7, "verify": 0.05}[stage])
                if child.poll() is None:
                    child.send_signal(signal.SIGKILL)
                    killed.append(stage)
                break
        child.stderr.read()
        child.wait()
    assert len(killed) >= 3, f"the machine was too quick for the test: only {killed} were killed"
    last = edgetune("run", "tiny.yaml", "name=killed", "--until", "verify")
    assert last.returncode == 0, last.stderr
    expected = {k: v for k, v in contents(project / "runs/whole").items() if "inference_model" not in k}
    found = {k: v for k, v in contents(project / "runs/killed").items() if "inference_model" not in k}
    assert found == expected  # inference_model.json carries the run's name
    assert leftovers(project) == []


def test_ctrl_c_ends_with_a_word_and_no_leftovers(project: Path) -> None:
    command = [sys.executable, "-u", "-m", "edgetune", "run", "tiny.yaml", "train.epochs=500", "--until", "train"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stderr
    for line in child.stderr:
        if line.startswith("train …"):
            time.sleep(1)
            child.send_signal(signal.SIGINT)
            break
    rest = child.stderr.read()
    assert child.wait(60) == 130
    assert "interrupted" in rest and "Traceback" not in rest
    assert leftovers(project) == [] and not (project / "runs/tiny/adapter").exists()


def test_interrupted_and_resumed_equals_uninterrupted(project: Path) -> None:
    long = ["train.epochs=6", "train.evaluations=6", "train.dropout=0.1"]
    Pipeline(recipe_file.load("tiny.yaml", [*long, "name=whole"])).run(until="train")

    class Stop(Exception):
        pass

    from edgetune.train import checkpoints

    real = checkpoints.Checkpoints.complete
    with pytest.MonkeyPatch.context() as patch:

        def stop_after_second(self: Any, step: int) -> None:
            real(self, step)
            if step >= 6:
                raise Stop

        patch.setattr(checkpoints.Checkpoints, "complete", stop_after_second)
        with pytest.raises(Stop):
            Pipeline(recipe_file.load("tiny.yaml", [*long, "name=cut"])).run(until="train")
    resumed = Pipeline(recipe_file.load("tiny.yaml", [*long, "name=cut"])).run(until="train")
    metrics = [json.loads(line) for line in (project / "runs/cut/train/metrics.jsonl").read_text().splitlines()]
    expected = [json.loads(line) for line in (project / "runs/whole/train/metrics.jsonl").read_text().splitlines()]
    for row in [*metrics, *expected]:
        row.pop("seconds", None)
    assert metrics == expected
    whole, cut = (read_manifest(project / f"runs/{name}/adapter")["outputs"] for name in ("whole", "cut"))
    assert whole["adapter_model.safetensors"] == cut["adapter_model.safetensors"]
    assert resumed.reports["train"]["steps"] == 18
    assert not (project / "runs/cut/checkpoints").exists()


def test_a_half_written_checkpoint_is_not_resumed_from(project: Path) -> None:
    from edgetune.train.checkpoints import Checkpoints

    kept = Checkpoints(project / "ck", "key", resume=False)
    for step in (2, 4):
        folder = project / "ck" / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "optimizer.pt").write_bytes(b"x" * 100)
        kept.record({"step": step, "loss": 1.0})
        kept.complete(step)
    (project / "ck/checkpoint-4/optimizer.pt").write_bytes(b"x" * 50)  # as a full disk leaves it
    (project / "ck/checkpoint-6").mkdir()
    again = Checkpoints(project / "ck", "key", resume=True)
    assert again.step == 2 and [row["step"] for row in again.metrics] == [2]
    assert Checkpoints(project / "ck", "another key", resume=True).step == 0


def test_two_runs_of_one_seed_are_equal_and_of_two_differ(project: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        Pipeline(recipe_file.load("tiny.yaml", [f"name={name}", f"seed={seed}"])).run(until="train")
    adapters = [read_manifest(project / f"runs/{n}/adapter")["outputs"]["adapter_model.safetensors"] for n in "abc"]
    assert adapters[0] == adapters[1] != adapters[2]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.train=missing.jsonl"], "missing.jsonl"),
        (["export.target=cpu-int9"], "did you mean `cpu-int"),
        (["model.id=./nowhere"], "nowhere"),
        (["model.chat_template=none.jinja"], "none.jinja"),
        (["train.target_modules=[q_prj]"], "q_proj"),
        (["data.max_length=100000"], "context"),
        (["data.form=alpaca"], "rows.jsonl:1"),
    ],
)
def test_wrong_input_is_one_message_and_leaves_no_half_run(project: Path, overrides: list[str], said: str) -> None:
    failed = edgetune("run", "tiny.yaml", *overrides, "name=bad")
    assert failed.returncode == 2, failed.stderr
    assert said in failed.stderr and "Traceback" not in failed.stderr and failed.stdout == ""
    assert leftovers(project) == []
    assert not (project / "runs/bad").exists() or (project / "runs/bad/data/manifest.json").is_file()


def test_what_cannot_be_exported_is_refused_before_it_is_trained(
    project: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the base before anything is done; by the rows as soon as they are counted."""
    import shutil

    from edgetune.train import trainer

    monkeypatch.setattr(trainer, "train", lambda *_, **__: pytest.fail("it trains"))
    plain = Path(shutil.copytree(tiny_model, project / "no-template"))
    (plain / "chat_template.jinja").unlink()
    write_jsonl(project / "texts.jsonl", [{"text": f"{n} and {n} are {2 * n}."} for n in range(16)])
    folder = project / "runs/bad"
    for overrides, said in (
        ([f"model.id={plain}", "data.train=texts.jsonl"], "no chat template, which every artifact needs"),
        (["export.target=qnn-npu", "export.max_length=100"], "no multiple of the 64"),
    ):
        with pytest.raises(InputError, match=said):
            run("name=bad", *overrides)
        assert not folder.exists()
        planned = plan(recipe_file.load("tiny.yaml", overrides), first=None, until=None, force=False)
        assert [check["what"] for check in planned["checks"] if said in check["what"] and not check["ok"]]
        with pytest.raises(pytest.fail.Exception, match="it trains"):
            run("name=not-exported", *overrides, until="train")
    for overrides, said in (
        (["export.target=cpu-int4"], r"data.train: \d+ tokens are too few to calibrate on"),
        (
            ["export.target=cpu-int8", "export.heal.steps=2"],
            r"data.train: 12 rows of \d+ tokens are too few to heal on",
        ),
    ):
        with pytest.raises(InputError, match=said):
            run("name=bad", *overrides)
        assert (folder / "data").is_dir() and not (folder / "adapter").exists() and leftovers(project) == []


def test_the_second_run_is_quick_and_needs_no_torch(project: Path) -> None:
    run()
    code = (
        "import sys; from edgetune import recipe_file; from edgetune.pipeline import Pipeline\n"
        "result = Pipeline(recipe_file.load('tiny.yaml')).run()\n"
        "assert not any(result.done.values()), result.done\n"
        "print(sorted({'torch', 'transformers', 'peft', 'onnxruntime'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_a_second_run_leaves_the_first_alone(project: Path) -> None:
    folder = RunFolder(project / "runs/tiny")
    with folder.locked():  # as the first one holds it while it fetches its base
        second = edgetune("run", "tiny.yaml", cwd=project)
        assert second.returncode == 2 and "another edgetune process" in second.stderr
        assert (project / "runs/tiny").is_dir()


def test_dry_run_writes_nothing(project: Path) -> None:
    before = sorted(path for path in project.rglob("*") if "edgetune-home" not in path.parts)
    shown = edgetune("run", "tiny.yaml", "--dry-run", "--json")
    assert shown.returncode == 0, shown.stderr
    planned = json.loads(shown.stdout)
    assert [stage["name"] for stage in planned["stages"]] == list(STAGES)
    assert all(stage["redo"] and stage["seconds"] > 0 and stage["memory_mb"] > 0 for stage in planned["stages"])
    assert planned["recipe"]["train"]["rank"] == 4 and all(check["ok"] for check in planned["checks"])
    assert sorted(path for path in project.rglob("*") if "edgetune-home" not in path.parts) == before
    text = edgetune("run", "tiny.yaml", "--dry-run", "data.train=missing.jsonl")
    assert text.returncode == 2 and "NOT OK no such data file: missing.jsonl" in text.stdout
