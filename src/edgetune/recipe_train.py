"""The recipe's `train` and `merge`, and which of their options make no sense together."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from edgetune.recipe_section import Section, changed, refused


class EarlyStopping(Section):
    """Stop when validation loss no longer falls."""

    patience: int = Field(3, ge=1, description="Evaluations without improvement before training stops.")
    min_delta: float = Field(0.0, ge=0, description="Improvement in loss that counts.")


class DistributedSection(Section):
    """Training on several processes or machines."""

    engine: Literal["ddp", "deepspeed", "fsdp"] = Field(
        "ddp", description="`ddp` copies the model to each process; `deepspeed` and `fsdp` divide it."
    )
    zero_stage: Literal[1, 2, 3] | None = Field(
        None,
        description="DeepSpeed only, 2 when not given: 1 divides the optimizer state, 2 the gradients too, 3 the weights "
        "too.",
    )
    offload: Literal["none", "cpu"] = Field(
        "none", description="`cpu` keeps what is divided in main memory; deepspeed and fsdp only."
    )

    @model_validator(mode="after")
    def _makes_sense(self) -> DistributedSection:
        if self.engine != "deepspeed" and self.zero_stage:
            raise refused(
                "train.distributed.zero_stage",
                f"zero_stage is DeepSpeed's, the engine is {self.engine}",
                "remove it, or set train.distributed.engine: deepspeed",
            )
        if self.engine == "ddp" and self.offload != "none":
            raise refused(
                "train.distributed.offload",
                "ddp keeps the whole model in each process: there is nothing to offload",
                "remove it, or set train.distributed.engine: deepspeed (or fsdp)",
            )
        return self


class TrainSection(Section):
    """Fine-tuning."""

    method: Literal["lora", "qlora", "dora", "full"] = Field(
        "lora",
        description="`lora` trains low-rank updates; `qlora` does so on a base kept in 4 bits (NF4); `dora` trains the "
        "weights' lengths too; `full` trains all weights.",
    )
    rank: int = Field(16, ge=1, le=1024, description="Rank of the LoRA matrices.")
    alpha: float = Field(
        32, gt=0, description="LoRA scale: the update is multiplied by alpha / rank (by alpha / √rank with `rslora`)."
    )
    rslora: bool = Field(False, description="Rank-stabilized scale (arXiv 2312.03732), for large ranks.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear",
        description="Layers that get an adapter: `all-linear` (the head left out), or a list of names: `[q_proj, v_proj]`.",
    )
    modules_to_save: list[str] = Field(
        default_factory=list, description="Modules that are trained whole beside the adapter: `[lm_head]`."
    )
    initialization: Literal["default", "gaussian", "pissa", "olora", "eva", "loftq"] = Field(
        "default", description="How the adapter starts: peft's `init_lora_weights`; `default` changes nothing at first."
    )
    neftune_alpha: float | None = Field(
        None,
        gt=0,
        description="Noise on the embeddings while training (NEFTune, arXiv 2310.05914); off when not given.",
    )
    quantization_aware: bool = Field(
        False,
        description="The adapter learns through the weights as `export.target` rounds them, beginning with the codes that it "
        "chooses for the base, and the export keeps exactly these; lora only.",
    )
    distillation: float = Field(
        1.0,
        ge=0,
        description="With `quantization_aware`: weight of the KL divergence of the rounded model from itself unrounded, "
        "beside the loss; 0 leaves it out, and a third of the time.",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Share of the target that goes to all other tokens.")
    epochs: float = Field(1.0, gt=0, le=10_000, description="Passes over the training rows.")
    max_steps: int | None = Field(None, ge=1, le=1_000_000, description="Optimizer steps; overrides `epochs`.")
    batch_size: int | None = Field(None, ge=1, description="Rows an optimizer step; 8 when nothing is given.")
    batch_tokens: int | None = Field(
        None, ge=8, description="Tokens an optimizer step, in place of `batch_size`: as many whole rows as fit."
    )
    gradient_accumulation: int = Field(
        1, ge=1, description="Multiplies the step's batch: this many times `batch_size` rows or `batch_tokens`."
    )
    pass_tokens: int | None = Field(
        None,
        ge=8,
        description="Tokens a forward pass holds at most (a longer row goes alone). Decides memory and speed, not the "
        "result; chosen to fit when not given.",
    )
    packing: Literal["auto"] | bool = Field(
        "auto",
        description="Rows of a pass one behind the other without padding, each seeing only itself; `auto`: where the "
        "model's attention allows it.",
    )
    learning_rate: float | None = Field(
        None, gt=0, lt=1, description="Peak learning rate; one that fits the method and the model when not given."
    )
    learning_rate_multiplier: float = Field(1.0, gt=0, le=1000, description="Multiplies the learning rate.")
    lora_plus_ratio: float | None = Field(
        None, ge=1, description="LoRA+ (arXiv 2402.12354): learning rate of B over that of A; off when not given."
    )
    optimizer: Literal["adamw", "adafactor", "adamw_8bit"] = Field("adamw", description="Optimizer.")
    scheduler: Literal["cosine", "linear", "constant", "polynomial", "inverse_sqrt"] = Field(
        "cosine", description="Course of the learning rate after warm-up."
    )
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of the steps in which the learning rate rises.")
    weight_decay: float = Field(0.0, ge=0, description="The optimizer's weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    evaluations: int = Field(
        4,
        ge=1,
        description="Validations during training, evenly spread; each may become the best checkpoint.",
    )
    early_stopping: EarlyStopping | None = Field(None, description="Off when not given.")
    samples: int = Field(
        3, ge=0, description="Validation prompts that are answered before and after training, for the report."
    )
    sample_tokens: int = Field(48, ge=1, description="Tokens of each such answer at most.")
    trackers: list[Literal["tensorboard", "trackio"]] = Field(
        default_factory=list, description="Where the metrics also go; `metrics.jsonl` and the plot are always written."
    )
    gradient_checkpointing: Literal["auto"] | bool = Field(
        "auto", description="Compute activations twice to save memory; `auto`: only where memory would not do."
    )
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto",
        description="Of the frozen base: `auto` takes bfloat16 where this processor multiplies it natively. Adapters are float32.",
    )
    threads: int | None = Field(None, ge=1, description="CPU threads; all cores when not given.")
    distributed: DistributedSection | None = Field(None, description="One process when not given.")

    @model_validator(mode="after")
    def _early_stopping_can_happen(self) -> TrainSection:
        if self.early_stopping and self.early_stopping.patience >= self.evaluations:
            raise refused(
                "train.early_stopping",
                f"early_stopping.patience is {self.early_stopping.patience}, evaluations is {self.evaluations}: "
                "it could never stop anything",
                "raise train.evaluations or lower train.early_stopping.patience",
            )
        return self

    @model_validator(mode="after")
    def _one_batch_size(self) -> TrainSection:
        if self.batch_size is not None and self.batch_tokens is not None:
            raise refused(
                "train.batch_tokens",
                "batch_size and batch_tokens both say how large a step is",
                "keep one of train.batch_size (rows) and train.batch_tokens (tokens)",
            )
        return self

    @model_validator(mode="after")
    def _learning_rate_is_one(self) -> TrainSection:
        rate = (self.learning_rate or 0.0) * self.learning_rate_multiplier
        if rate >= 1:
            raise refused(
                "train.learning_rate_multiplier",
                f"the learning rate would be {rate:g}, and nothing learns from 1 on",
                "lower train.learning_rate_multiplier or train.learning_rate",
            )
        return self

    @model_validator(mode="after")
    def _method_has_its_options(self) -> TrainSection:
        adapter_only = (
            "rank",
            "alpha",
            "rslora",
            "dropout",
            "target_modules",
            "modules_to_save",
            "initialization",
            "lora_plus_ratio",
        )
        if self.method == "full" and (found := changed(self, *adapter_only)):
            raise refused(
                f"train.{found[0]}",
                f"method full trains all weights and has no adapter, so {', '.join(found)} would do nothing",
                "remove it, or set train.method: lora",
            )
        if not self.target_modules:
            raise refused(
                "train.target_modules",
                "no layer would get an adapter",
                "name layers, such as [q_proj, v_proj], or write all-linear",
            )
        if self.target_modules != "all-linear" and (both := set(self.target_modules) & set(self.modules_to_save)):
            raise refused(
                "train.modules_to_save",
                f"{', '.join(sorted(both))} would be trained whole and have an adapter",
                "name it in one of train.target_modules and train.modules_to_save",
            )
        return self

    @model_validator(mode="after")
    def _initialization_fits(self) -> TrainSection:
        kind = self.initialization
        if kind == "loftq" and self.method != "qlora":
            raise refused(
                "train.initialization",
                f"loftq starts the adapter at the error of the 4-bit base; with method {self.method} there is none",
                "set train.method: qlora, or another initialization",
            )
        if kind not in ("pissa", "olora"):
            return self
        if self.method == "qlora":
            raise refused(
                "train.initialization",
                f"{kind} takes the adapter out of the base, and 4 bits would not hold what remains exactly",
                "use loftq, which is made for a 4-bit base, or train.method: lora",
            )
        if self.method == "dora":
            raise refused(
                "train.initialization",
                f"{kind} takes the adapter out of the base, whose lengths dora trains: the result could not be put back",
                "use default, gaussian or eva with dora, or train.method: lora",
            )
        if self.dropout:
            raise refused(
                "train.dropout",
                f"with {kind} the adapter holds the main part of the base's own weights, which dropout would switch off",
                "remove train.dropout, or use another initialization",
            )
        return self

    @model_validator(mode="after")
    def _learns_through_rounding(self) -> TrainSection:
        if not self.quantization_aware:
            if changed(self, "distillation"):
                raise refused(
                    "train.distillation",
                    "without train.quantization_aware there is no rounded model to compare",
                    "remove it, or set train.quantization_aware: true",
                )
            return self
        if self.method != "lora":
            raise refused(
                "train.method",
                f"quantization_aware rounds W + sBA, the base with a LoRA adapter; {self.method} has no such sum",
                "set train.method: lora, or remove train.quantization_aware",
            )
        if self.initialization in ("pissa", "olora"):
            raise refused(
                "train.initialization",
                f"{self.initialization} takes the adapter out of the base, and quantization_aware rounds the base as it was "
                "published with the adapter added",
                "use default, gaussian or eva",
            )
        for name, why in (
            ("dropout", "an adapter's dropout does not exist in the rounded sum"),
            ("modules_to_save", "what is trained whole beside the adapter would not be rounded"),
            ("neftune_alpha", "the rounded model and the plain one would be compared under different noise"),
        ):
            if getattr(self, name):
                raise refused(f"train.{name}", why, f"remove train.{name}, or train.quantization_aware")
        if self.distributed and self.distributed.engine != "ddp":
            raise refused(
                "train.distributed.engine",
                f"{self.distributed.engine} divides the weights, which quantization_aware rounds whole",
                "use train.distributed.engine: ddp, or remove train.quantization_aware",
            )
        return self

    @model_validator(mode="after")
    def _can_be_divided(self) -> TrainSection:
        engine = self.distributed
        if engine is None or engine.engine == "ddp":
            return self
        by = f"deepspeed's stage {engine.zero_stage or 2}" if engine.engine == "deepspeed" else "fsdp"
        if self.method == "qlora" and (engine.engine == "fsdp" or engine.zero_stage == 3):
            raise refused(
                "train.distributed",
                f"{by} divides the weights, and 4-bit ones cannot be divided",
                "use deepspeed with zero_stage 1 or 2, or ddp; or train.method: lora",
            )
        if self.optimizer != "adamw":
            raise refused(
                "train.optimizer",
                f"{by} divides what the optimizer holds of a weight into flat pieces; {self.optimizer} needs it whole",
                "use train.optimizer: adamw, or train.distributed.engine: ddp",
            )
        return self


class MergeSection(Section):
    """Folding the adapter into the base."""

    onto: Literal["trained", "full-precision"] = Field(
        "trained",
        description="qlora only: the weights that were trained against (the 4-bit ones, dequantized), or the base as it "
        "was published; the report gives the validation loss of both.",
    )
    rows: int = Field(4, ge=1, description="Validation rows on which base+adapter and merged logits are compared.")
    tolerance: float = Field(
        1e-3,
        gt=0,
        description="Largest difference of a log-probability (float32) between base+adapter and the merged, saved and reloaded model.",
    )
