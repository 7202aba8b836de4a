"""A stage alone, on folders that someone else may have made: merge, export, verify."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from edgetune.errors import InputError
from edgetune.files import staged_folder
from edgetune.recipe import ExportSection, MergeSection, ModelSection, VerifySection
from edgetune.run import Work, read_manifest, seal


def merge_adapter(
    adapter: Path, out: Path, model: ModelSection | None = None, tolerance: float | None = None
) -> dict[str, Any]:
    """Fold an adapter folder into its base.

    Args:
        adapter: peft adapter folder.
        out: folder of the merged model; replaced as a whole.
        model: the base; what adapter_config.json names when not given.
        tolerance: see `MergeSection`.

    Returns:
        The report of `edgetune.train.merge.merge`, with `path`.

    Raises:
        InputError: no adapter, or its base is not the one that it was trained on.
    """
    from edgetune.export.contract import CONVERSATIONS
    from edgetune.models import load_tokenizer, resolve
    from edgetune.train.merge import check_adapter, merge

    config = check_adapter(adapter)
    _not_inside(out, adapter)
    named = config.get("base_model_name_or_path")
    if model is None:
        if not named:
            raise InputError("the adapter does not name its base", where=adapter, fix="give it: --base MODEL")
        model = ModelSection(
            id=str(named),
            revision=config.get("revision") if "/" in str(named) and ":" not in str(named) else None,
        )
    base = resolve(model)
    trained_on = read_manifest(adapter).get("inputs", {}).get("base", {}).get("sha256")
    if trained_on and trained_on != base.digest:
        raise InputError(
            f"{model.id} is not the base that the adapter was trained on ({named}): their files differ",
            where=adapter,
            fix="give the very base: --base MODEL",
        )
    tokenizer = load_tokenizer(base.path, trust_remote_code=model.trust_remote_code)
    texts = [turn["content"] for conversation in CONVERSATIONS for turn in conversation]
    rows = [ids for text in texts if (ids := tokenizer(text, add_special_tokens=False)["input_ids"])]
    section = MergeSection() if tolerance is None else MergeSection(tolerance=tolerance)
    work = Work("merge", {"base": {"id": base.id, "sha256": base.digest}}, section.model_dump())
    with tempfile.TemporaryDirectory(prefix="edgetune-") as report, staged_folder(out) as merged:
        found = merge(section, model, base, adapter, rows, stop_id=None, report=Path(report), merged=merged)
        seal(merged, work)
    return {"path": str(out), **found}


def export_model(merged: Path, out: Path, section: ExportSection, name: str | None = None) -> dict[str, Any]:
    """Make an artifact of a transformers folder.

    Args:
        merged: the folder.
        out: the artifact; replaced as a whole.
        section: target and context.
        name: the artifact's name; the name of `out`'s folder when not given.

    Returns:
        The report of `edgetune.export.package.export`, with `path`.
    """
    from edgetune.export.package import export
    from edgetune.export.targets import load_target
    from edgetune.models import resolve
    from edgetune.pipeline import describe

    target = load_target(section.target)
    _not_inside(out, merged)
    base = resolve(ModelSection(id=str(merged.absolute())))
    named = name or (out.parent.name if out.name == "artifact" else out.name)
    options = {
        "target": target.model_dump(exclude={"description", "needs"}),
        "max_length": section.max_length,
        "name": named,
    }
    work = Work("export", {"merged": base.digest}, options)
    with tempfile.TemporaryDirectory(prefix="edgetune-") as report, staged_folder(out) as artifact:
        found = export(
            merged,
            target,
            section.max_length,
            name=named,
            chain={"base": describe(base)},
            work=work,
            artifact=artifact,
            report=Path(report),
        )
    return {"path": str(out), **found}


def verify_artifact(
    artifact: Path,
    merged: Path | None,
    data: Path | None,
    rows: int | None,
    limits: dict[str, float],
    out: Path | None,
) -> dict[str, Any]:
    """Compare an artifact with the model that it was made from.

    Args:
        artifact: artifact or run folder.
        merged: transformers folder; `merged` beside the artifact when not given.
        data: examples in any form; `data/validation.jsonl` beside the artifact when not given.
        rows: how many; the run's own recipe decides when not given.
        limits: limits that replace the run's or the default ones.
        out: folder for report.json, or None.

    Returns:
        The report of `edgetune.export.verify.verify`, with `path`.
    """
    from edgetune.data.examine import encode_any
    from edgetune.data.render import Renderer
    from edgetune.export.verify import verify
    from edgetune.models import check_folder, load_tokenizer
    from edgetune.runtime.artifact import open_artifact

    opened = open_artifact(artifact)
    run = opened.path.parent
    against, held_out = merged or run / "merged", data or run / "data" / "validation.jsonl"
    if merged is None and not against.is_dir():
        raise InputError("no merged model lies beside the artifact", where=opened.path, fix="name it: --against FOLDER")
    if data is None and not held_out.is_file():
        raise InputError(
            "no held-out rows lie beside the artifact",
            where=opened.path,
            fix="name a file of examples: --data FILE",
        )
    check_folder(against)
    recipe = _recipe(run)
    section = VerifySection.model_validate(recipe.get("verify", {}))
    section = section.model_copy(
        update={
            "rows": rows or section.rows,
            "limits": section.limits.model_copy(update=limits),
        }
    )
    renderer = Renderer(load_tokenizer(against))
    encoded = encode_any(held_out, renderer, recipe.get("data", {}).get("train_on", "assistant"), opened.max_length)
    if out is None:
        with tempfile.TemporaryDirectory(prefix="edgetune-") as folder:
            found = verify(opened.path, against, encoded, section, Path(folder))
    else:
        with staged_folder(out) as folder:
            found = verify(opened.path, against, encoded, section, folder)
    return {"path": str(opened.path), **found}


def _recipe(run: Path) -> dict[str, Any]:
    try:
        found = json.loads((run / "recipe.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _not_inside(out: Path, source: Path) -> None:
    """Refuse an output folder that would replace or lie inside its own input, or replace a folder of another kind."""
    new, old = out.absolute().resolve(), source.absolute().resolve()
    if new == old or new in old.parents or old in new.parents:
        raise InputError(
            "the output folder would overwrite the input",
            where=out,
            fix="choose another folder: --out FOLDER",
        )
    if out.is_dir() and any(out.iterdir()) and not (out / "manifest.json").is_file():
        raise InputError(
            "holds files that edgetune did not write",
            where=out,
            fix="choose an empty or a new folder: --out FOLDER",
        )
    if out.exists() and not out.is_dir():
        raise InputError("is a file", where=out, fix="choose a folder: --out FOLDER")
