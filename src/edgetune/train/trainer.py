"""Fine-tuning on transformers' Trainer: steps, validation, checkpoints, resuming, the report."""

from __future__ import annotations

import functools
import math
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgetune import progress
from edgetune.data.batch import Encoded, sizes
from edgetune.errors import InputError
from edgetune.export.quantize.kept import FILE, save
from edgetune.files import write_json, write_text
from edgetune.models import Base
from edgetune.models.quiet import quiet
from edgetune.recipe import TrainSection
from edgetune.runtime.memory import peak_rss_mb, reset_peak
from edgetune.train import attention, distributed, memory, method, samples, shards, trackers
from edgetune.train.checkpoints import Checkpoints
from edgetune.train.curves import remarks
from edgetune.train.evaluate import evaluate
from edgetune.train.objective import Objective
from edgetune.train.optimizer import default_learning_rate
from edgetune.train.plot import plot_loss
from edgetune.train.schedule import filled, passes, schedule, steps_a_pass
from edgetune.train.stepping import Steps, arguments, trainer_class
from edgetune.train.threads import threads
from edgetune.train.watch import Step, Watcher, stops

if TYPE_CHECKING:
    from edgetune.export.quantize.grid import Quantized
    from edgetune.export.quantize.plan import Plan
    from edgetune.train.grids import Rounding


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
        stop_ids: tokens that end an answer.
        name: what the run is called in trackers.
        grids: what the export rounds to, with `train.quantization_aware`.
        calibration_tokens: of training rows, which its codes are chosen by then.
    """

    base: Base
    tokenizer: Any
    train: Sequence[Encoded]
    validation: Sequence[Encoded]
    seed: int
    key: str
    trust_remote_code: bool = False
    place: Callable[[int], str] = "row {}".format
    stop_ids: frozenset[int] = frozenset()
    name: str = "edgetune"
    grids: Plan | None = None
    calibration_tokens: int = 8192


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
    import transformers

    trackers.check(section.trackers)
    memory.bound_kept_code()
    reset_peak()
    started = time.monotonic()
    transformers.set_seed(job.seed)
    with distributed.first_goes_first():
        kept = Checkpoints(checkpoints, job.key, resume)
    with quiet(), threads(section.threads):
        training = _prepare(section, job, kept)
        steps = len(training.steps)
        prompts = samples.pick(job.validation, section.samples)

        def answers(model: Any) -> list[str]:
            return samples.answers(model, job.tokenizer, prompts, section.sample_tokens, job.stop_ids)

        def look_at_base(model: Any) -> None:
            with progress.task("validate base", len(job.validation)) as bar:
                before = training.score(model, bar.advance)
            plain = _plain(training)  # by all processes
            kept.settle("plain_before", lambda: plain)
            if not math.isfinite(before["loss"]):
                raise InputError(
                    "the base model's own loss is not a number: its weights are broken",
                    where=job.base.path,
                    fix="get the model again, or try train.dtype=float32",
                )
            kept.record({"step": 0, **{f"validation_{name}": value for name, value in before.items()}})
            said = answers(model)
            kept.settle("answers_before", lambda: said)

        if kept.last:
            progress.say(f"train: resuming after step {kept.step} of {steps}")
        elif distributed.divides_weights(section):  # then the model runs once the engine holds it, and not before
            training.watch.begin = look_at_base
        else:
            look_at_base(training.trainer.model)
        if kept.step < steps and not stops(section, kept):  # else all that was missing is what follows
            try:
                training.trainer.train(resume_from_checkpoint=str(kept.last) if kept.last else None)
            finally:
                training.watch.close(*sys.exc_info())
        kept.restore_best(training.trainer.model)
        unread = kept.settle("answers_before", list)
        shown = samples.compare(job.tokenizer, prompts, unread, answers(training.trainer.model), job.stop_ids)

        result = _report(section, job, training, kept)
        if training.rounding:
            grids = dict(Counter(map(str, training.rounding.grids.values())).most_common())
            plain = {"before": kept.settle("plain_before", dict), "after": _plain(training)}
            result["quantization_aware"] = {"grids": grids, "distillation": section.distillation, "validation": plain}
    result |= {"seconds_in_all": round(time.monotonic() - started, 1), "samples": shown}
    if not distributed.place().first:
        return result
    method.publish(kept.best, adapter, base=job.base, tokenizer=job.tokenizer)
    if training.rounding:
        save(adapter / FILE, training.rounding.quantized(training.trainer.model))
    write_text(report / "metrics.jsonl", (checkpoints / "metrics.jsonl").read_text(encoding="utf-8"))
    plot_loss(kept.metrics, f"{job.base.id}, {section.method}", report / "loss.png")
    if (kept.folder / "tensorboard").is_dir():
        shutil.copytree(kept.folder / "tensorboard", report / "tensorboard")
    write_json(report / "report.json", result)
    return result


@dataclass(frozen=True)
class _Training:
    """All that one training is made of."""

    trainer: Any
    watch: Watcher
    objective: Objective
    fit: memory.Fit
    steps: list[Step]
    steps_a_pass: int
    padding: float
    score: Callable[..., dict[str, float]]
    rounding: Rounding | None


def _plain(training: _Training) -> dict[str, float] | None:
    """Validation of the model without rounding, where it trains with it."""
    if training.rounding is None:
        return None
    with training.rounding.off():
        return training.score(training.trainer.model)


def _report(section: TrainSection, job: Job, training: _Training, kept: Checkpoints) -> dict[str, Any]:
    import torch

    trainer, told = training.trainer, _told(kept.metrics)
    trainable = shards.parameters(trainer.model, trained_only=True)
    whole = shards.parameters(trainer.model)
    return {
        "method": section.method,
        **told,
        "stopped_early": kept.metrics[-1]["step"] < len(training.steps),
        "epochs": round(kept.metrics[-1]["step"] / training.steps_a_pass, 3),
        "rows": {"train": len(job.train), "validation": len(job.validation)},
        "peak_rss_mb": round(peak_rss_mb(), 1),
        "parameters": whole if section.method == "full" else whole - trainable,
        "trainable_parameters": trainable,
        "learning_rate": trainer.args.learning_rate,
        "pass_tokens": training.fit.pass_tokens,
        "packed": training.objective.packed,
        "padding": round(training.padding, 4),
        "gradient_checkpointing": training.fit.checkpointing,
        "dtype": str(method.base_dtype(section)).removeprefix("torch."),
        "device": str(trainer.args.device),
        "threads": torch.get_num_threads(),
        "processes": distributed.place().size,
        "seed": job.seed,
    }


def _prepare(section: TrainSection, job: Job, kept: Checkpoints) -> _Training:
    import transformers

    lengths, learned = sizes(job.train)
    steps = [
        Step(rows, int(lengths[rows].sum()), int(learned[rows].sum())) for rows in schedule(lengths, section, job.seed)
    ]
    model = method.build(
        section,
        job.base,
        trust_remote_code=job.trust_remote_code,
        attention=None,
        rows=job.train,
        resumed=kept.last is not None,
    )
    _onto_device(section, model)
    objective = _objective(section, job, model)
    rounding = None
    if section.quantization_aware:
        from edgetune.train.distill import learn_through

        assert job.grids is not None
        begin = functools.partial(_begun, job, kept)
        rounding = learn_through(job.grids, begin, section.distillation, model, objective, job.base)
    fit = _fit(section, job, kept, objective, model)

    def score(model: Any, done: Callable[[int], None] | None = None) -> dict[str, float]:
        return evaluate(objective, model, job.validation, fit.pass_tokens, done)

    watch = Watcher(section, kept, steps, score, job.place)
    parameters = sum(p.numel() for p in model.parameters())
    shown = section.model_dump(exclude_none=True)
    trainer = trainer_class()(
        objective=objective,
        section=section,
        model=model,
        args=arguments(section, job.seed, len(steps), default_learning_rate(section, parameters), kept.folder, model),
        train_dataset=Steps(job.train, steps, lengths, fit.pass_tokens),
        data_collator=lambda items: {"passes": [objective.batch(rows) for rows in items[0][0]], "learned": items[0][1]},
        callbacks=[
            watch,
            *(
                trackers.callbacks(section.trackers, job.name, kept.folder, shown, kept.metrics)
                if distributed.place().first
                else []
            ),
        ],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    a_pass = steps_a_pass(lengths, section, job.seed)
    padding = _padding(steps[:a_pass], lengths, fit.pass_tokens, objective.packed)
    return _Training(trainer, watch, objective, fit, steps, a_pass, padding, score, rounding)


def _begun(job: Job, kept: Checkpoints) -> dict[str, Quantized]:
    """What training through the export's rounding begins with: chosen by the first process, once."""
    from edgetune.export.quantized import calibration_rows
    from edgetune.train.grids import start

    assert job.grids is not None
    rows = [row.ids for row in calibration_rows(job.train, job.calibration_tokens)]
    with distributed.first_goes_first():
        return start(job.grids, job.base, rows, kept.folder / FILE, trust_remote_code=job.trust_remote_code)


def _onto_device(section: TrainSection, model: Any) -> None:
    """Put the model where it trains, so that what is proved and counted before is so there."""
    import torch

    whole = not distributed.divides_weights(section) and section.method != "qlora"  # those are put there by others
    if torch.cuda.is_available() and whole:
        model.to(torch.device("cuda", distributed.place().local_rank))


def _fit(section: TrainSection, job: Job, kept: Checkpoints, objective: Objective, model: Any) -> memory.Fit:
    """Passes that memory holds; the same ones again when a training resumes, so that it gives the same bits."""
    found: list[memory.Fit] = []

    def decide() -> dict[str, Any]:
        longest = max(int(sizes(rows)[0].max()) for rows in (job.train, job.validation))
        found.append(memory.fit(section, objective, model, longest))
        return {"pass_tokens": found[0].pass_tokens, "checkpointing": found[0].checkpointing}

    settled = memory.Fit(**kept.settle("passes", decide))
    if found and found[0].why:
        progress.say(f"train: {found[0].why}")
    if not found and settled.checkpointing:
        memory.compute_twice(model)
    return settled


def _padding(steps: Sequence[Step], lengths: np.ndarray, pass_tokens: int, packed: bool) -> float:
    """Share of what is computed that is padding."""
    cut = [[lengths[row] for row in one] for step in steps for one in passes(step.rows, lengths, pass_tokens)]
    computed = sum(filled(int(sum(one))) if packed else len(one) * max(one) for one in cut)
    return 1 - sum(map(sum, cut)) / computed


def _objective(section: TrainSection, job: Job, model: Any) -> Objective:
    tokenizer = job.tokenizer
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    packed = section.packing is not False and attention.use(model)
    compute = method.base_dtype(section) if section.method == "full" else None
    objective = Objective(model, pad_id, packed, section.label_smoothing, compute)
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
        "warnings": remarks(metrics),
    }


def _of(row: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("validation_"): value for name, value in row.items() if name.startswith("validation_")}
