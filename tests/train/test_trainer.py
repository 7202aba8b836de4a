"""Training on the tiny model: loss, adapter, early stopping, divergence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgetune.data.render import Encoded
from edgetune.errors import EdgetuneError, InputError
from edgetune.models import Base, load_model, load_tokenizer, resolve
from edgetune.recipe import EarlyStopping, ModelSection, TrainSection
from edgetune.train.trainer import Job, train

QUICK = {"rank": 4, "learning_rate": 0.01, "batch_size": 4, "epochs": 2.0, "evaluations": 2, "dtype": "float32"}


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> Base:
    return resolve(ModelSection(id=str(tiny_model)))


def rows(count: int, start: int = 0) -> list[Encoded]:
    """Rows in which the second half repeats the first, so that there is something to learn."""
    found = []
    for n in range(start, start + count):
        half = [5 + (n * 7 + k * 3) % 300 for k in range(6 + n % 5)]
        found.append(Encoded([*half, *half], [False] * len(half) + [True] * len(half)))
    return found


def trained(base: Base, folder: Path, section: dict[str, Any], **job: Any) -> dict[str, Any]:
    for name in ("report", "adapter"):
        (folder / name).mkdir(parents=True)
    fields: dict[str, Any] = {"train": rows(16), "validation": rows(6, 100), "seed": 1, "key": "k", **job}
    return train(
        TrainSection(**section),
        Job(base=base, tokenizer=load_tokenizer(base.path), **fields),
        report=folder / "report",
        adapter=folder / "adapter",
        checkpoints=folder / "ck",
        resume=False,
    )


def test_report_metrics_plot_and_adapter(base: Base, tmp_path: Path) -> None:
    report = trained(base, tmp_path, QUICK)
    assert report["validation"]["after"]["loss"] < report["validation"]["before"]["loss"]
    assert report["steps"] == 8 and report["epochs"] == 2.0 and not report["stopped_early"]
    assert report["tokens"] == 2 * sum(len(row.ids) for row in rows(16))
    assert report["learned_tokens"] == 2 * sum(sum(row.learned) for row in rows(16))
    assert report["peak_rss_mb"] > 50 and report["tokens_per_s"] > 0
    metrics = [json.loads(line) for line in (tmp_path / "report/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics if "loss" in row] == list(range(1, 9))
    assert [row["step"] for row in metrics if "validation_loss" in row] == [0, 4, 8]
    assert (tmp_path / "report/loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
    ]
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["r"] == 4 and config["base_model_name_or_path"] == base.id


def test_first_loss_is_the_mean_over_learned_tokens_whatever_the_batches(base: Base, tmp_path: Path) -> None:
    """One step over all rows: plain cross entropy, one large batch, and four small ones with accumulation agree."""
    import torch

    model = load_model(base.path, dtype=torch.float32)
    total, count = 0.0, 0
    for row in rows(16):
        logits = model(input_ids=torch.tensor([row.ids])).logits[0, :-1]
        targets = torch.tensor([t if keep else -100 for t, keep in zip(row.ids, row.learned, strict=True)])[1:]
        total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=-100).item()
        count += int((targets != -100).sum())
    ways: dict[str, dict[str, Any]] = {
        "one": {"batch_size": 16},
        "many": {"batch_size": 4, "gradient_accumulation": 4, "pass_tokens": 40},
        "padded": {"batch_size": 16, "pass_tokens": 60, "packing": False},
    }
    for name, way in ways.items():
        section = {**QUICK, **way, "max_steps": 1}
        assert trained(base, tmp_path / name, section)["loss_train_first"] == pytest.approx(total / count, rel=1e-5)
    norms = [json.loads((tmp_path / n / "report/metrics.jsonl").read_text().splitlines()[1])["grad_norm"] for n in ways]
    assert norms == [pytest.approx(norms[0], rel=1e-4)] * 3


def test_best_adapter_is_kept_not_the_last(base: Base, tmp_path: Path) -> None:
    section = {**QUICK, "learning_rate": 0.3, "epochs": 6.0, "evaluations": 24, "scheduler": "constant"}
    report = trained(base, tmp_path, section)
    metrics = [json.loads(line) for line in (tmp_path / "report/metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["validation_loss"] for row in metrics if "validation_loss" in row and row["step"]}
    assert report["validation"]["after"]["loss"] == min(losses.values())
    assert losses[report["best_step"]] == min(losses.values())


def test_early_stopping(base: Base, tmp_path: Path) -> None:
    section = {**QUICK, "epochs": 50.0, "evaluations": 100, "early_stopping": EarlyStopping(patience=2, min_delta=10.0)}
    report = trained(base, tmp_path, section)
    assert report["stopped_early"] and report["steps"] == 6  # first evaluation, then two without an improvement of 10


def test_divergence_stops_with_the_step_and_the_cure(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgetune.train.objective import Objective

    real, calls = Objective.loss, []

    def broken(self: Objective, model: Any, batch: Any) -> Any:
        calls.append(1)
        return real(self, model, batch) * (float("nan") if len(calls) == 6 else 1)  # three passes are for memory

    monkeypatch.setattr(Objective, "loss", broken)
    with pytest.raises(EdgetuneError, match="step 3: training diverged") as caught:
        trained(base, tmp_path, QUICK, place="rows.jsonl:{}".format)
    assert "learning_rate" in str(caught.value) and str(caught.value).count("rows.jsonl:") == 4


def test_a_loss_that_stays_far_above_is_divergence(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgetune.train.objective import Objective

    real, calls = Objective.loss, []

    def rising(self: Objective, model: Any, batch: Any) -> Any:
        calls.append(1)
        return real(self, model, batch) * (3 if len(calls) > 30 else 1)

    monkeypatch.setattr(Objective, "loss", rising)
    with pytest.raises(EdgetuneError, match=r"step 3\d: training diverged: loss .* steps in a row") as caught:
        trained(base, tmp_path, {**QUICK, "epochs": 20.0, "learning_rate": 1e-4})
    assert "the best adapter so far" not in str(caught.value) or "is in" in str(caught.value)


def test_the_report_answers_prompts_before_and_after(base: Base, tmp_path: Path) -> None:
    """The best weights answer, not the last: the answers are those of the saved adapter."""
    import torch
    from peft import PeftModel

    from edgetune.train import samples

    section = {**QUICK, "learning_rate": 0.1, "epochs": 24.0, "evaluations": 24, "scheduler": "constant", "samples": 2}
    report = trained(base, tmp_path, section, train=rows(2))  # learned by heart: other rows get worse
    assert report["best_step"] < report["steps"]
    assert len(report["samples"]) == 2
    tokenizer = load_tokenizer(base.path)
    plain = load_model(base.path, dtype=torch.float32)
    prompts = samples.pick(rows(6, 100), 2)
    assert [one["before"] for one in report["samples"]] == samples.answers(plain, tokenizer, prompts, 48, ())
    model = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))
    assert [one["after"] for one in report["samples"]] == samples.answers(model, tokenizer, prompts, 48, ())


@pytest.mark.parametrize("section", [{"method": "dora"}, {"method": "full", "dtype": "bfloat16"}, {"method": "full"}])
def test_other_methods_learn_too(base: Base, tmp_path: Path, section: dict[str, Any]) -> None:
    quick = {**QUICK, **section}
    if section["method"] == "full":
        del quick["rank"]
    report = trained(base, tmp_path, quick)
    assert report["validation"]["after"]["loss"] < report["validation"]["before"]["loss"] - 0.05
    assert report["method"] == section["method"] and report["packed"] and 0 <= report["padding"] < 1 / 16
    whole = report["trainable_parameters"] == report["parameters"]
    assert whole is (section["method"] == "full")


def test_a_layer_that_is_not_there(base: Base, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="q_prj") as caught:
        trained(base, tmp_path, {**QUICK, "target_modules": ["q_prj"]})
    assert "q_proj" in str(caught.value)


def test_only_named_layers_get_an_adapter(base: Base, tmp_path: Path) -> None:
    from safetensors import safe_open

    trained(base, tmp_path, {**QUICK, "target_modules": ["q_proj"], "max_steps": 1})
    with safe_open(str(tmp_path / "adapter/adapter_model.safetensors"), "pt") as file:
        assert all(".q_proj." in name for name in file.keys())  # noqa: SIM118 - not a dict
