"""Fine-tuning on transformers' Trainer: steps, validation, checkpoints, resuming, the report."""

from __future__ import annotations

import contextlib
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune import progress
from edgetune.data.batch import Encoded
from edgetune.errors import InputError
from edgetune.files import read_json, write_json, write_text
from edgetune.models import Base, load_model
from edgetune.models.quiet import quiet
from edgetune.recipe import TrainSection
from edgetune.runtime.hardware import checked_threads
from edgetune.runtime.memory import peak_rss_mb, reset_peak
from edgetune.train import attention
from edgetune.train.adapter import add_adapter, base_dtype
from edgetune.train.checkpoints import Checkpoints
from edgetune.train.evaluate import evaluate
from edgetune.train.objective import Objective
from edgetune.train.plot import plot_loss
from edgetune.train.schedule import DEFAULT_PASS_TOKENS, passes, schedule, steps_a_pass
from edgetune.train.watch import Step, Watcher, stops


@dataclass(frozen=True)
class Job:
    """What one training needs beside the recipe's section.

    Attributes:
        base: the base model.
        tokenizer: the one that the rows were encoded with, with its chat template.
        train, validation: encoded rows.
        seed: of initialization, dropout and data order.
        key: digest of everything that decides the result; checkpoints are bound to it.
        trust_remote_code: run code that the base brings.
        place: where the training row of a number comes from, as file:line.
    """

    base: Base
    tokenizer: Any
    train: Sequence[Encoded]
    validation: Sequence[Encoded]
    seed: int
    key: str
    trust_remote_code: bool = False
    place: Callable[[int], str] = "row {}".format


def train(
    section: TrainSection, job: Job, *, report: Path, adapter: Path, checkpoints: Path, resume: bool
) -> dict[str, Any]:
    """Train an adapter and keep the best one by validation loss.

    Args:
        section: the recipe's `train`.
        job: base, rows and seed.
        report: existing folder that gets report.json, metrics.jsonl and loss.png.
        adapter: existing folder that gets the adapter in peft's format.
        checkpoints: folder of checkpoints, which outlives a crash; removed by the caller once the adapter is in place.
        resume: go on from the last whole checkpoint of the same key.

    Returns:
        The report.

    Raises:
        EdgetuneError: the loss is no longer a number.
    """
    import torch
    import transformers

    reset_peak()
    started = time.monotonic()
    transformers.set_seed(job.seed)
    kept = Checkpoints(checkpoints, job.key, resume)
    with quiet(), _threads(section.threads):
        trainer, watch, score = _prepare(section, job, kept)
        steps = trainer.args.max_steps
        if kept.last:
            progress.say(f"train: resuming after step {kept.step} of {steps}")
        else:
            with progress.task("validate base", len(job.validation)) as bar:
                before = score(trainer.model, bar.advance)
            if not math.isfinite(before["loss"]):
                raise InputError(
                    "the base model's own loss is not a number: its weights are broken",
                    where=job.base.path,
                    fix="get the model again, or try train.dtype=float32",
                )
            kept.record({"step": 0, **{f"validation_{name}": value for name, value in before.items()}})
        if kept.step < steps and not stops(section, kept):  # else all that was missing is what follows
            try:
                trainer.train(resume_from_checkpoint=str(kept.last) if kept.last else None)
            finally:
                watch.close(*sys.exc_info())

    result = {
        "method": section.method,
        **_told(kept.metrics),
        "stopped_early": kept.metrics[-1]["step"] < steps,
        "epochs": round(
            kept.metrics[-1]["step"] / steps_a_pass([len(row.ids) for row in job.train], section, job.seed), 3
        ),
        "rows": {"train": len(job.train), "validation": len(job.validation)},
        "seconds_in_all": round(time.monotonic() - started, 1),
        "peak_rss_mb": round(peak_rss_mb(), 1),
        "parameters": trainer.model.get_base_model().num_parameters(exclude_embeddings=False)
        - trainer.model.num_parameters(only_trainable=True),
        "trainable_parameters": trainer.model.num_parameters(only_trainable=True),
        "dtype": str(base_dtype(section)).removeprefix("torch."),
        "device": str(trainer.args.device),
        "threads": section.threads or torch.get_num_threads(),
        "seed": job.seed,
    }
    shutil.copyfile(kept.best / "adapter_model.safetensors", adapter / "adapter_model.safetensors")
    config = read_json(kept.best / "adapter_config.json")  # with the base's id in place of its folder on this machine
    config |= {"base_model_name_or_path": job.base.id, "revision": job.base.revision}
    config["target_modules"] = sorted(config["target_modules"])  # a set in peft, so in another order each time
    write_json(adapter / "adapter_config.json", config)
    if job.tokenizer.chat_template:  # so that whoever merges the adapter gives the model what it was trained with
        write_text(adapter / "chat_template.jinja", job.tokenizer.chat_template)
    write_text(report / "metrics.jsonl", (checkpoints / "metrics.jsonl").read_text(encoding="utf-8"))
    plot_loss(kept.metrics, f"{job.base.id}, {section.method}", report / "loss.png")
    write_json(report / "report.json", result)
    return result


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """torch on `count` threads while the block runs, on its own choice when None."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(checked_threads(count) if count else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _prepare(
    section: TrainSection, job: Job, kept: Checkpoints
) -> tuple[Any, Watcher, Callable[..., dict[str, float]]]:
    """The trainer, its watcher, and the validation of a model."""
    import transformers

    model = add_adapter(
        load_model(job.base.path, dtype=base_dtype(section), trust_remote_code=job.trust_remote_code), section
    )
    objective = _objective(section, job, model)
    budget = kept.settle("pass_tokens", section.pass_tokens or DEFAULT_PASS_TOKENS)
    lengths = [len(row.ids) for row in job.train]
    learned = [sum(row.learned[1:]) for row in job.train]
    steps = [
        Step(rows.tolist(), sum(lengths[row] for row in rows), sum(learned[row] for row in rows))
        for rows in schedule(lengths, section, job.seed)
    ]

    def score(model: Any, done: Callable[[int], None] | None = None) -> dict[str, float]:
        return evaluate(objective, model, job.validation, budget, done)

    watch = Watcher(section, kept, steps, score, job.place)
    trainer = _trainer_class()(
        objective=objective,
        model=model,
        args=_arguments(section, job.seed, len(steps), kept.folder),
        train_dataset=_Steps(job.train, steps, lengths, budget),
        data_collator=lambda items: {"passes": [objective.batch(rows) for rows in items[0][0]], "learned": items[0][1]},
        callbacks=[watch],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer, watch, score


def _objective(section: TrainSection, job: Job, model: Any) -> Objective:
    tokenizer = job.tokenizer
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    packed = section.packing is not False and attention.use(model)
    objective = Objective(model, pad_id, packed, section.label_smoothing)
    given_up = objective.prove(model, job.validation)
    if section.packing is True and not objective.packed:
        raise InputError(
            "rows of this model cannot be packed" + "".join(f": {said}" for said in given_up),
            where="train.packing",
            fix="leave it at auto: rows are padded then",
        )
    for said in given_up:
        progress.say(f"train: {said}")
    return objective


def _told(metrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the rows of metrics.jsonl come to."""
    first, *validations = [row for row in metrics if "validation_loss" in row]
    best = min(validations, key=lambda row: row["validation_loss"])
    steps = [row for row in metrics if "loss" in row]
    seconds, tokens = sum(row["seconds"] for row in steps), sum(row["tokens"] for row in steps)
    return {
        "validation": {"before": _of(first), "after": _of(best)},
        "loss_train_first": steps[0]["loss"],
        "loss_train_last": steps[-1]["loss"],
        "steps": metrics[-1]["step"],
        "best_step": best["step"],
        "tokens": tokens,
        "learned_tokens": sum(row["learned_tokens"] for row in steps),
        "tokens_per_s": round(tokens / seconds, 1) if seconds else None,
        "seconds": round(seconds, 1),
        "warnings": _warnings(first["validation_loss"], best["validation_loss"]),
    }


def _trainer_class() -> Any:
    import torch
    from transformers import Trainer

    class StepTrainer(Trainer):
        """Trainer whose batches are whole optimizer steps, and whose loss is the mean over a step's learned tokens."""

        def __init__(self, *, objective: Objective, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self._objective = objective

        def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
            model.train()
            inputs = self._prepare_inputs(inputs)
            total = torch.zeros((), device=self.args.device)
            for number, batch in enumerate(inputs["passes"], 1):
                last = number == len(inputs["passes"])
                with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                    loss = self._objective.loss(model, batch) / inputs["learned"]
                    self.accelerator.backward(loss)
                total += loss.detach()
            return total

        def floating_point_ops(self, inputs: dict[str, Any]) -> int:
            return 0  # a count of the batch's own shape, for which there is no single one here

    return StepTrainer


class _Steps:
    """The steps as the dataset that Trainer wants: an item is a step's passes, and its number of learned tokens."""

    def __init__(
        self, rows: Sequence[Encoded], steps: Sequence[Step], lengths: Sequence[int], pass_tokens: int
    ) -> None:
        self._rows, self._steps, self._lengths, self._pass_tokens = rows, steps, lengths, pass_tokens

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, index: int) -> tuple[list[list[Encoded]], int]:
        step = self._steps[index]
        cut = passes(step.rows, self._lengths, self._pass_tokens)
        return [[self._rows[row] for row in one] for one in cut], step.learned


def _arguments(section: TrainSection, seed: int, steps: int, checkpoints: Path) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=steps,
        per_device_train_batch_size=1,  # an item is a whole step
        learning_rate=(section.learning_rate or 2e-4) * section.learning_rate_multiplier,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(section.scheduler, section.scheduler),
        warmup_steps=math.ceil(section.warmup * steps),
        weight_decay=section.weight_decay,
        max_grad_norm=section.max_grad_norm,
        seed=seed,
        data_seed=seed,
        train_sampling_strategy="sequential",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",  # the watcher says when
        eval_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )


def _of(row: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("validation_"): value for name, value in row.items() if name.startswith("validation_")}


def _warnings(before: float, after: float) -> list[str]:
    if after < before:
        return []
    return [
        f"validation loss did not fall ({before:.3f} → {after:.3f}): train longer, change train.learning_rate, or check the data"
    ]
