"""Targets: what kind of device an artifact is for. A YAML file each in `export/`, or one of the user's own."""

from __future__ import annotations

import difflib
from dataclasses import replace
from math import lcm
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from edgetune.errors import InputError
from edgetune.export.quantize.plan import Plan
from edgetune.export.quantize.section import QuantizationSection
from edgetune.files import read_json
from edgetune.recipe import AutoSection, ExportSection, Limits, Recipe
from edgetune.recipe_file import shipped
from edgetune.recipe_section import Section, changed
from edgetune.runtime.hardware import architecture
from edgetune.runtime.providers import Status, status

Provider = Literal["cpu", "cuda", "dml", "webgpu", "tensorrt-rtx", "openvino", "qnn", "vitisai"]
# Those for which the model builder writes GroupQueryAttention in float32, which fixed shapes are made from.
_FIXED = ("cpu", "webgpu", "openvino", "qnn", "vitisai")


class GraphRules(Section):
    """What the graph must not contain. It is checked after every export."""

    opset: int = Field(22, ge=7, description="Newest opset of the standard operators.")
    domains: list[str] = Field(
        default_factory=lambda: ["ai.onnx", "com.microsoft"],
        description="Operator domains that the provider knows; `ai.onnx` are the standard operators.",
    )
    forbidden_ops: list[str] = Field(default_factory=list, description="Operator types that it does not run.")
    forbidden_types: list[str] = Field(
        default_factory=list, description="Types of tensors that it does not know, in ONNX's words: bfloat16, double."
    )
    head_size_multiple: int = Field(1, ge=1, description="What divides the size of the model's attention heads.")


class StaticShapes(Section):
    """Graphs of fixed shapes for NPUs and FPGAs: one that reads the prompt, one that reads a token."""

    prefill: int = Field(64, ge=2, description="Tokens of a prompt that are read at once.")
    activation_bits: Literal[8, 16] = Field(
        8, description="Bits of the activations, calibrated on the training rows; weights have 8."
    )
    modules: dict[str, Literal[8, 16]] = Field(
        default_factory=dict, description="Bits of what single modules read and write, such as `down_proj: 16`."
    )


class Target(Section):
    """One edge device profile."""

    description: str = Field(description="What it is for.")
    needs: str = Field(description="What it needs on the device.")
    provider: Provider = Field(description="ONNX Runtime execution provider.")
    precision: Literal["fp32", "fp16", "bf16", "int8", "int4"] = Field(description="Precision of the weights.")
    options: dict[str, str | int | float | bool] = Field(
        default_factory=dict, description="Further options of the ONNX Runtime GenAI model builder."
    )
    quantization: QuantizationSection | None = Field(
        None, description="How the weights are rounded; as the model builder does it when not given."
    )
    graph: GraphRules = Field(default_factory=GraphRules, description="What the graph must not contain.")
    static: StaticShapes | None = Field(None, description="Fixed shapes and 8-bit QDQ; dynamic shapes when not given.")
    architecture: Literal["any", "x86-64", "arm64"] = Field(
        "any", description="The processor that it runs on. Elsewhere its graph is checked, as without the device."
    )
    kv_cache: Literal["float", "int8"] = Field(
        "float", description="int8 takes a quarter of float32's memory in long contexts; scales are calibrated."
    )
    limits: Limits = Field(default_factory=Limits, description="The gate's limits where the recipe gives none.")

    @model_validator(mode="after")
    def _static_needs_int8(self) -> Target:
        if self.static and self.precision != "int8":
            raise ValueError("`static` quantizes weights to 8 bits: set precision: int8")
        if self.static and self.provider not in _FIXED:
            raise ValueError(f"`static` goes with the providers {', '.join(_FIXED)}: set one of them")
        return self

    @model_validator(mode="after")
    def _quantized_is_int(self) -> Target:
        if self.quantization and (self.static or self.precision not in ("int4", "int8")):
            raise ValueError("`quantization` goes with precision int4 or int8, and not with `static`")
        return self

    @model_validator(mode="after")
    def _int8_activations_are_the_cpu_s(self) -> Target:
        grids = [self.quantization, *self.quantization.modules.values()] if self.quantization else []
        if self.provider != "cpu" and any(grid.activations == "int8" for grid in grids):
            raise ValueError("`activations: int8` (DynamicQuantizeMatMul) goes with the provider cpu")
        return self

    @model_validator(mode="after")
    def _auto_measures_here(self) -> Target:
        if self.quantization and self.quantization.method == "auto" and self.provider != "cpu":
            raise ValueError("`method: auto` measures this processor: it goes with the provider cpu")
        return self

    @model_validator(mode="after")
    def _int8_cache_where_attention_has_it(self) -> Target:
        if self.kv_cache == "int8" and (self.static or self.provider not in ("cpu", "cuda")):
            raise ValueError("`kv_cache: int8` goes with the providers cpu and cuda, and not with `static`")
        return self

    @property
    def calibrates(self) -> bool:
        """Whether training rows are needed."""
        if self.static or self.kv_cache == "int8":
            return True
        return self.quantization is not None and self.quantization.plan().calibrated

    def options_of_work(self) -> dict[str, Any]:
        """What decides the artifact, for its manifest; what only people read is left out."""
        return self.model_dump(exclude={"description", "needs"})


def names() -> list[str]:
    """The targets that come with edgetune."""
    return sorted(path.stem for path in shipped("export").glob("*.yaml"))


def load_target(name: str) -> Target:
    """Read a target by name or by its file.

    Raises:
        InputError: there is no such target, or its file is wrong.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else shipped("export") / f"{name}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(name, names(), 1, 0.4)
        raise InputError(
            f"there is no target `{name}`",
            where="export.target",
            fix=(f"did you mean `{near[0]}`? " if near else "")
            + f"targets: {', '.join(names())}, or a YAML file of your own",
        )
    try:
        return Target.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"not valid YAML: {str(error).splitlines()[0]}", where=path) from error
    except ValidationError as error:
        problems = [(".".join(map(str, p["loc"])), p["msg"].removeprefix("Value error, ")) for p in error.errors()]
        told = "; ".join((f"`{key}`: " if key else "") + what[0].lower() + what[1:] for key, what in problems)
        raise InputError(told, where=path, fix=f"compare it with {shipped('export') / 'cpu-int8.yaml'}") from error


def target_of(section: ExportSection) -> Target:
    """The target of a recipe's `export`, with the limits that the recipe gives for `method: auto`.

    Raises:
        InputError: as `load_target`, or the target does not choose grids by limits.
    """
    target, own = load_target(section.target), section.auto
    given, others = own.limits, {name: getattr(own, name) for name in changed(own, "tokens", "points")}
    if target.quantization is None or target.quantization.method != "auto":
        if others or any(value is not None for value in given.values()):
            raise InputError(
                f"the target {section.target} does not choose grids by limits",
                where="export.auto",
                fix="set export.target: cpu-auto, or remove the limits",
            )
        return target
    known = target.quantization.auto
    auto = AutoSection.model_validate(
        {"tokens": known.tokens, "points": known.points, **(given or known.limits), **others}
    )
    return target.model_copy(
        update={
            "quantization": target.quantization.model_copy(update={"auto": auto}),
            "limits": _promised(target.limits, auto),
        }
    )


def _promised(limits: Limits, auto: AutoSection) -> Limits:
    """The gate's limits: no looser than what the grids were chosen by."""
    if auto.kld_mean is None or auto.kld_mean >= limits.kld_mean:
        return limits
    return limits.model_copy(update={"kld_mean": auto.kld_mean})


def target_for(recipe: Recipe) -> Target:
    """The target of a recipe's export, which has grids where the recipe trains through them.

    Raises:
        InputError: as `target_of`, or the target has no grids that training could know.
    """
    target = target_of(recipe.export)
    if not recipe.train.quantization_aware:
        return target
    section = target.quantization
    if section is None or section.method == "auto":
        raise InputError(
            f"the target {recipe.export.target} "
            + ("chooses its grids after training" if section else "has no quantization of edgetune's own")
            + ", so there are none to train through",
            where="train.quantization_aware",
            fix="set export.target: cpu-int4, another target with `quantization`, or train without it",
        )
    return target


def trained_through(recipe: Recipe) -> Plan | None:
    """The grids that the recipe trains through; None where it does not."""
    if not recipe.train.quantization_aware:
        return None
    section = target_for(recipe).quantization
    assert section is not None
    return section.plan()


def status_of(target: Target) -> Status:
    """How a target's provider stands on this machine. On a processor of another architecture it finds no device."""
    found, here = status(target.provider), architecture()
    if target.architecture in ("any", here):
        return found
    note = f"is for {target.architecture} processors, and this one is {here}"
    return replace(
        found, devices=(), prepares=False, note=note, fix=f"take the artifact to an {target.architecture} machine"
    )


def require_fit(target: Target, merged: Path) -> None:
    """Raise InputError where the target's provider cannot run the model's attention.

    `GroupQueryAttention` takes heads of a multiple of 8 numbers, of 16 where it turns them by their positions itself, as it does
    in all graphs of the model builder but DirectML's.
    """
    found = read_json(merged / "config.json")
    found = found.get("text_config") or found
    heads, hidden = found.get("num_attention_heads"), found.get("hidden_size")
    size = found.get("head_dim") or (hidden // heads if heads and hidden else None)
    multiple = lcm(target.graph.head_size_multiple, 8 if target.provider == "dml" else 16)
    if size and size % multiple:
        raise InputError(
            f"its attention heads have {size} numbers; ONNX Runtime's attention on {target.provider} needs a multiple of "
            f"{multiple}",
            where=merged / "config.json",
            fix="choose another model",
        )


def with_limits(target: Target, own: Limits) -> Limits:
    """The gate's limits: the target's, replaced by those that the recipe names, and no looser than `auto`'s."""
    limits = target.limits.model_copy(update={name: getattr(own, name) for name in own.model_fields_set})
    section = target.quantization
    return limits if section is None else _promised(limits, section.auto)


def limits_of(artifact: Path) -> Limits:
    """The limits of the target that an artifact was exported for; the defaults where its manifest has none."""
    try:
        return Limits.model_validate(read_json(artifact / "manifest.json")["options"]["target"]["limits"])
    except (InputError, KeyError, TypeError, ValidationError):
        return Limits()
