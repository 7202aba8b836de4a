"""What each stage of a recipe would do: its inputs by hash, and its options; and what can be refused before any begins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune import progress
from edgetune.data.examine import train_files, validation_files
from edgetune.errors import GateError, InputError, require_extra
from edgetune.files import digest, sha256_file
from edgetune.run import RunFolder, Work

if TYPE_CHECKING:
    from edgetune.models import Base
    from edgetune.recipe import Recipe


def stage_work(stage: str, recipe: Recipe, base: Base, folder: RunFolder) -> Work:
    """What `stage` would do now. The stages before it must have been done.

    Args:
        stage: one of `edgetune.run.STAGES`.
        recipe: with the gate's limits in full.
        base: its base model.
        folder: the run.

    Raises:
        InputError: a data file is missing, or there is no such target.
    """
    content = folder.content
    base_id = {"id": base.id, "revision": base.revision, "sha256": base.digest}
    template = sha256_file(Path(recipe.model.chat_template)) if recipe.model.chat_template else None
    # What decides how prepared rows become tokens.
    reading = {"train_on": recipe.data.train_on, "max_length": recipe.data.max_length, "chat_template": template}
    if stage == "data":
        tokenizer = {name: value for name, value in base.files.items() if not name.endswith((".safetensors", ".py"))}
        options = recipe.data.model_dump(exclude={"train", "validation"})
        if not isinstance(recipe.data.validation, str):
            options["validation"] = recipe.data.validation.model_dump()
        inputs: dict[str, Any] = {
            "train rows": [file_hash(folder, path) for path in train_files(recipe.data)],
            "validation rows": [file_hash(folder, path) for path in validation_files(recipe.data)],
            "tokenizer": digest(tokenizer),
            "chat template": template,
        }
        return Work(stage, inputs, {**options, "seed": recipe.seed})
    if stage == "train":
        options = {**recipe.train.model_dump(exclude={"distributed"}), **reading, "seed": recipe.seed}
        if recipe.train.quantization_aware:
            from edgetune.export.targets import target_for

            options["grids"] = target_for(recipe).model_dump(include={"quantization"})
        return Work(stage, {"base": base_id, "data": content("data")}, options)
    if stage == "merge":
        return Work(stage, {"base": base_id, "adapter": content("train")}, recipe.merge.model_dump())
    if stage == "export":
        from edgetune.export.targets import target_for

        target = target_for(recipe)
        options = {
            "target": target.options_of_work(),
            "max_length": recipe.export.max_length,
            "name": folder.path.name,
        }
        inputs = {"merged": content("merge")}
        if recipe.export.adapters == "separate":
            inputs = {"base": base_id, "adapter": content("train")}
            options |= {"adapters": "separate", "onto": recipe.merge.onto}
        if target.calibrates or recipe.export.heal.steps:
            inputs["data"] = content("data")
        if recipe.export.heal.steps:
            options |= {"heal": recipe.export.heal.model_dump(), "seed": recipe.seed}
        return Work(stage, inputs, options)
    if stage == "verify":
        inputs = {"artifact": content("export"), "merged": content("merge"), "data": content("data")}
        # An artifact that is brought to its device is verified there again.
        there = {"provider": runs_on(recipe)} if _on_its_device(recipe) else {}
        return Work(stage, inputs, {**recipe.verify.model_dump(), **reading, **there})
    from edgetune.runtime.hardware import cpu

    return Work(stage, {"artifact": content("export")}, {**recipe.bench.model_dump(), "cpu": digest(cpu())})


def runs_on(recipe: Recipe) -> str:
    """Where the artifact can be run here: the target's provider, else the CPU, which then stands in for it."""
    from edgetune.export.targets import load_target, status_of

    target = load_target(recipe.export.target)
    return target.provider if status_of(target).runs else "cpu"


def _on_its_device(recipe: Recipe) -> bool:
    """Whether this machine has the device that the target is for; any processor is none in particular."""
    from edgetune.export.targets import load_target, status_of

    target = load_target(recipe.export.target)
    return status_of(target).runs and (target.provider, target.architecture) != ("cpu", "any")


def left_out(stage: str, recipe: Recipe, export: dict[str, Any]) -> bool:
    """Whether verify or bench is left out, as the artifact's provider is not on this machine; says so.

    Args:
        stage: verify or bench.
        recipe: of the run.
        export: the report of its export.
    """
    device = export.get("device", {})
    if device.get("ran", True) or _on_its_device(recipe):
        return False
    missing = (
        f"the target {device['why_not']}"
        if device["provider"] == "cpu"
        else f"the provider {device['provider']} {device['why_not']} here"
    )
    if stage == "verify" and device.get("ran_on_cpu"):
        progress.say(
            f"verify: {missing}; the CPU stands in for it: what the graphs compute is compared, not what the device does"
        )
        return False
    progress.say(
        f"{stage}: left out: {missing}; the artifact was checked, not run on the device: there, `edgetune verify` and "
        "`edgetune bench` do both"
    )
    return True


def file_hash(folder: RunFolder, path: Path) -> str:
    """SHA-256 of a data file, remembered in the run. Raises InputError when it is missing."""
    if not path.is_file():
        raise InputError("no such data file", where=path, fix="check `data.train` and `data.validation`")
    return folder.hashes.file(path)


def look_before(recipe: Recipe, folder: RunFolder, stages: Sequence[str]) -> None:
    """Refuse what is sure to fail later (InputError), before anything is fetched or written."""
    from edgetune.export.targets import target_for
    from edgetune.train import method, trackers

    require_extra("train")
    method.require_installed(recipe.train)
    trackers.check(recipe.train.trackers)
    if "export" in stages:
        require_extra("export")
    target = target_for(recipe)
    if recipe.export.adapters == "separate":
        from edgetune.export.adapters.read import require_separable
        from edgetune.runtime.artifact import check_adapter_name

        require_separable(target)
        check_adapter_name(folder.path.name, "name")  # the adapter's, too
    for path in [*train_files(recipe.data), *validation_files(recipe.data)]:
        file_hash(folder, path)
    template = recipe.model.chat_template
    if template and not Path(template).is_file():
        raise InputError("no such file", where="model.chat_template", fix=f"check {template}")


def look_at_base(recipe: Recipe, base: Base, place: Path) -> None:
    """Refuse a base that will not be exported as the recipe wants it (InputError), before it is trained.

    Args:
        recipe: of the run.
        base: its base model.
        place: a folder on the disk that the run is written to.
    """
    from edgetune.export.preflight import preflight
    from edgetune.export.targets import target_for

    preflight(
        base.path,
        target_for(recipe),
        recipe.export.max_length,
        place,
        steps=recipe.export.heal.steps,
        before_training=True,
        chat_template=recipe.model.chat_template,
        trust_remote_code=recipe.model.trust_remote_code,
    )


def look_at_rows(recipe: Recipe, data: dict[str, Any]) -> None:
    """Refuse training rows that the export cannot calibrate or heal on (InputError), by the data stage's report."""
    from edgetune.export.preflight import require_rows
    from edgetune.export.targets import target_for

    require_rows(target_for(recipe), recipe.export.heal.steps, data["rows"]["train"], data["tokens"]["train"])


def missed(stage: str, report: dict[str, Any], artifact: Path) -> GateError | None:
    """What is said where a stage's result misses limits; None where it keeps them."""
    from edgetune.export.package import size_error
    from edgetune.export.verify import gate_error

    if stage == "export" and report.get("failures"):
        return size_error(report, artifact)
    return gate_error(report, artifact) if stage == "verify" and not report["passed"] else None


def with_target_limits(recipe: Recipe) -> Recipe:
    """The recipe with the gate's limits in full: its own, the target's where it gives none."""
    from edgetune.export.targets import target_of, with_limits

    limits = with_limits(target_of(recipe.export), recipe.verify.limits)
    if limits == recipe.verify.limits:
        return recipe
    return recipe.model_copy(update={"verify": recipe.verify.model_copy(update={"limits": limits})})
