"""transformers' Trainer, whose batches are whole optimizer steps: each is cut into passes, and into shares of processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.data.batch import Encoded
from edgetune.recipe import TrainSection
from edgetune.train import distributed, shards
from edgetune.train.objective import Objective
from edgetune.train.optimizer import make_optimizer
from edgetune.train.schedule import passes
from edgetune.train.watch import Step


def trainer_class() -> Any:
    """transformers' Trainer with the steps of this module."""
    import torch
    from transformers import Trainer

    class StepTrainer(Trainer):
        """Trainer whose batches are whole optimizer steps, and whose loss is the mean over a step's learned tokens."""

        def __init__(self, *, objective: Objective, section: TrainSection, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self._objective, self._section = objective, section
            self._groups: list[list[Any]] = []

        def create_optimizer(self, model: Any = None) -> Any:
            if getattr(self, "optimizer", None) is None:
                self.optimizer: Any = make_optimizer(model or self.model, self._section, self.args.learning_rate)
                if self.is_deepspeed_enabled:  # which flattens them
                    self._groups = [list(group["params"]) for group in self.optimizer.param_groups]
            return self.optimizer

        def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
            model.train()
            inputs = self._prepare_inputs(inputs)
            total = torch.zeros((), device=self.args.device)
            for number, batch in enumerate(inputs["passes"], 1):
                last = number == len(inputs["passes"])
                with distributed.one_pass(self, model, last):
                    loss = self._objective.loss(model, batch) / inputs["learned"]
                    distributed.backward(self, loss, last)
                total += loss.detach()
            return distributed.summed(total)

        def get_train_dataloader(self) -> Any:  # plain: a step's passes are shared out by `Steps`
            return torch.utils.data.DataLoader(self.train_dataset, batch_size=1, collate_fn=self.data_collator)

        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            distributed.fsdp_on_cpu(self)

        def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
            if not shards.divided(self):
                return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
            if resume_from_checkpoint:
                shards.load_weights(self.model, Path(resume_from_checkpoint))
            prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
            if resume_from_checkpoint:
                shards.load_state(self, Path(resume_from_checkpoint), self._groups)
            return prepared

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            state = shards.whole_weights(self.model)
            if self.args.should_save:
                self._save(output_dir, state)

        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            if shards.divided(self):
                shards.save_state(self, Path(output_dir), self._groups)
            else:
                super()._save_optimizer_and_scheduler(output_dir)

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            if hasattr(self.model, "peft_config"):  # peft asks the hub about embeddings unless it is told
                self.model.save_pretrained(output_dir, state_dict=state_dict, save_embedding_layers=False)
            else:
                super()._save(output_dir, state_dict)

        def floating_point_ops(self, inputs: dict[str, Any]) -> int:
            return 0  # a count of the batch's own shape, for which there is no single one here

    return StepTrainer


class Steps:
    """The steps as the dataset that Trainer wants: an item is this process's passes of a step, and the learned tokens
    of the whole step."""

    def __init__(self, rows: Sequence[Encoded], steps: Sequence[Step], lengths: np.ndarray, pass_tokens: int) -> None:
        self._rows, self._steps, self._lengths, self._pass_tokens = rows, steps, lengths, pass_tokens

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, index: int) -> tuple[list[list[Encoded]], int]:
        step = self._steps[index]
        cut = passes(step.rows, self._lengths, self._pass_tokens, distributed.place().size)
        return [
            distributed.filled([self._rows[row] for row in one], self._rows) for one in distributed.share(cut)
        ], step.learned


def arguments(section: TrainSection, seed: int, steps: int, learning_rate: float, checkpoints: Path, model: Any) -> Any:
    """The recipe's `train` in Trainer's words; what this package does itself is off there."""
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=steps,
        per_device_train_batch_size=1,  # an item is a whole step
        learning_rate=learning_rate,
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
        **distributed.training_arguments(section, model),
    )
