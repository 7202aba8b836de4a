"""Fine-tuning on transformers' Trainer: validation, checkpoints, resuming, the report."""

from __future__ import annotations

import contextlib
import math
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune import progress
from edgetune.data.batch import Encoded, collate
from edgetune.errors import EdgetuneError, InputError
from edgetune.files import read_json, write_json, write_text
from edgetune.models import Base, load_model
from edgetune.models.quiet import quiet
from edgetune.recipe import TrainSection
from edgetune.runtime.hardware import checked_threads
from edgetune.runtime.memory import peak_rss_mb, reset_peak
from edgetune.train.adapter import add_adapter, base_dtype
from edgetune.train.checkpoints import Checkpoints
from edgetune.train.evaluate import evaluate, learned_logits
from edgetune.train.plot import plot_loss
from edgetune.train.schedule import schedule

_CHECKPOINT_EVERY_S = 300.0


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
    """

    base: Base
    tokenizer: Any
    train: Sequence[Encoded]
    validation: Sequence[Encoded]
    seed: int
    key: str
    trust_remote_code: bool = False


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
        trainer, watch, steps = _prepare(section, job, kept)
        if kept.last:
            progress.say(f"train: resuming after step {kept.step} of {steps}")
        else:
            with progress.task("validate base", len(job.validation)) as bar:
                before = evaluate(trainer.model, job.validation, watch.pad_id, section.batch_size, bar.advance)
            if not math.isfinite(before["loss"]):
                raise InputError(
                    "the base model's own loss is not a number: its weights are broken",
                    where=job.base.path,
                    fix="get the model again, or try train.dtype=float32",
                )
            kept.record({"step": 0, **{f"validation_{name}": value for name, value in before.items()}})
        if kept.step < steps and not _stops(section, kept):  # else all that was missing is what follows
            try:
                trainer.train(resume_from_checkpoint=str(kept.last) if kept.last else None)
            finally:
                watch.close(*sys.exc_info())

    result = {
        "method": section.method,
        **_told(kept.metrics),
        "stopped_early": kept.metrics[-1]["step"] < steps,
        "epochs": round(kept.metrics[-1]["step"] / _steps_a_pass(section, job), 3),
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


def _steps_a_pass(section: TrainSection, job: Job) -> int:
    return math.ceil(len(job.train) / (section.batch_size * section.gradient_accumulation))


def _prepare(section: TrainSection, job: Job, kept: Checkpoints) -> tuple[Any, Any, int]:
    """The trainer, its watcher, and the number of optimizer steps."""
    import torch
    import transformers

    pad_id = job.tokenizer.pad_token_id if job.tokenizer.pad_token_id is not None else job.tokenizer.eos_token_id
    model = load_model(job.base.path, dtype=base_dtype(section), trust_remote_code=job.trust_remote_code)
    steps = section.max_steps or max(1, math.ceil(_steps_a_pass(section, job) * section.epochs))
    lengths = [len(row.ids) for row in job.train]
    batches = schedule(lengths, section.batch_size, steps * section.gradient_accumulation, job.seed)
    watch = _watcher(section, job, kept, steps, batches, pad_id)
    trainer = _trainer_class()(
        model=add_adapter(model, section),
        args=_arguments(section, job.seed, steps, kept.folder),
        train_dataset=_Batches(job.train, batches),
        data_collator=lambda items: {
            name: torch.from_numpy(value)
            for name, value in collate([row for item in items for row in item], pad_id).items()
        },
        callbacks=[watch],
    )
    trainer.model_accepts_loss_kwargs = True  # our loss divides by the tokens of the whole step itself
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer, watch, steps


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

    class LearnedTokensTrainer(Trainer):
        """Trainer whose loss is the mean over the tokens that carry loss in the whole optimizer step."""

        def compute_loss(
            self,
            model: Any,
            inputs: dict[str, Any],
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            logits, targets = learned_logits(model, inputs)
            return torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch

    return LearnedTokensTrainer


class _Batches:
    """The scheduled batches as the dataset that Trainer wants: an item is a whole batch."""

    def __init__(self, rows: Sequence[Encoded], schedule: Sequence[Sequence[int]]) -> None:
        self._rows, self._schedule = rows, schedule

    def __len__(self) -> int:
        return len(self._schedule)

    def __getitem__(self, index: int) -> list[Encoded]:
        return [self._rows[row] for row in self._schedule[index]]


def _arguments(section: TrainSection, seed: int, steps: int, checkpoints: Path) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=steps,
        per_device_train_batch_size=1,  # an item is a whole batch
        gradient_accumulation_steps=section.gradient_accumulation,
        learning_rate=section.learning_rate,
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


def _watcher(
    section: TrainSection,
    job: Job,
    kept: Checkpoints,
    steps: int,
    batches: Sequence[Sequence[int]],
    pad_id: int,
) -> Any:
    """The callback that validates, keeps the best adapter, checkpoints, and shows how far training is."""
    from transformers import TrainerCallback

    every = max(1, math.ceil(steps / section.evaluations))
    tokens = _per_step(batches, section.gradient_accumulation, [len(row.ids) for row in job.train])
    learned = _per_step(batches, section.gradient_accumulation, [sum(row.learned) for row in job.train])

    class Watcher(TrainerCallback):
        def __init__(self) -> None:
            self.pad_id = pad_id
            self.saved_at = self.step_at = 0.0
            self.shown: Any = None
            self.bar: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.shown = progress.task("train", steps)
            self.bar = self.shown.__enter__()
            self.bar.advance(state.global_step)
            self.step_at = self.saved_at = time.monotonic()

        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, Any], model: Any = None, **kwargs: Any
        ) -> None:
            if "loss" not in logs:  # Trainer's summary at the end
                return
            step = state.global_step
            loss, norm = float(logs["loss"]), float(logs["grad_norm"])
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise EdgetuneError(
                    f"training diverged: loss {loss}, gradient norm {norm}",
                    where=f"step {step}",
                    fix="lower train.learning_rate, raise train.warmup, or set train.dtype=float32",
                )
            now = time.monotonic()
            kept.record(
                {
                    "step": step,
                    "loss": loss,
                    "grad_norm": norm,
                    "learning_rate": float(logs["learning_rate"]),
                    "tokens": tokens[step - 1],
                    "learned_tokens": learned[step - 1],
                    "seconds": round(now - self.step_at, 4),
                }
            )
            self.bar.advance(1, f"loss {loss:.3f}")
            if step % every == 0 or step == steps:
                self.validate(step, model)
                control.should_training_stop = control.should_training_stop or _stops(section, kept)
                control.should_save = True
            elif now - self.saved_at > _CHECKPOINT_EVERY_S:
                control.should_save = True
            self.step_at = time.monotonic()

        def validate(self, step: int, model: Any) -> None:
            found = evaluate(model, job.validation, pad_id, section.batch_size)
            earlier = [loss for at, loss in kept.validations() if at]
            if not earlier or found["loss"] < min(earlier):
                kept.keep_best(model, step, found["loss"])
            kept.record({"step": step, **{f"validation_{name}": value for name, value in found.items()}})
            self.bar.advance(0, f"validation loss {found['loss']:.3f}")

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kept.complete(state.global_step)
            self.step_at = self.saved_at = time.monotonic()

        def close(self, *error: Any) -> None:
            """End the progress display; called however training ends."""
            if self.shown:
                self.shown.__exit__(*error)
                self.shown = None

    return Watcher()


def _per_step(batches: Sequence[Sequence[int]], accumulation: int, sizes: Sequence[int]) -> list[int]:
    counts = [sum(sizes[row] for row in batch) for batch in batches]
    return [sum(counts[start : start + accumulation]) for start in range(0, len(counts), accumulation)]


def _stops(section: TrainSection, kept: Checkpoints) -> bool:
    """Whether early stopping says that training is over, from the validations so far."""
    rule = section.early_stopping
    losses = [loss for step, loss in kept.validations() if step]
    if rule is None or len(losses) <= rule.patience:
        return False
    return min(losses[-rule.patience :]) > min(losses[: -rule.patience]) - rule.min_delta


def _of(row: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("validation_"): value for name, value in row.items() if name.startswith("validation_")}


def _warnings(before: float, after: float) -> list[str]:
    if after < before:
        return []
    return [
        f"validation loss did not fall ({before:.3f} → {after:.3f}): train longer, change train.learning_rate, or check the data"
    ]
