"""A stage alone, on folders that someone else may have made: merge, export, verify."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgetune.errors import InputError, require_extra
from edgetune.files import digest, staged_folder, write_json
from edgetune.leases import lease
from edgetune.progress import say
from edgetune.recipe import DataSection, ExportSection, MergeSection, ModelSection, Recipe, VerifySection
from edgetune.run import FOLDERS, NOT_CONTENT, Work, read_manifest, seal

if TYPE_CHECKING:
    from edgetune.data.render import Encoded
    from edgetune.models import Base


def merge_adapter(
    adapter: Path,
    out: Path,
    model: ModelSection | None = None,
    *,
    onto: Literal["trained", "full-precision"] = "trained",
    data: Path | None = None,
) -> dict[str, Any]:
    """Fold an adapter folder into its base.

    Args:
        adapter: peft adapter folder, or the whole model that a training with method full wrote.
        out: folder of the merged model; replaced as a whole.
        model: the base; what adapter_config.json names when not given.
        onto: of an adapter that was trained with qlora, which weights it is merged onto.
        data: examples in any form, on which the loss with both is measured; the rows that lie beside the adapter in its
            run when not given.

    Returns:
        The report of `edgetune.train.merge.merge`, with `path`.

    Raises:
        InputError: no adapter, or its base is not the one that it was trained on.
    """
    from edgetune.export.contract import CONVERSATIONS
    from edgetune.models import load_tokenizer, resolve
    from edgetune.train.merge import check_adapter, is_whole, merge

    require_extra("train")
    whole = is_whole(adapter)
    config = {} if whole else check_adapter(adapter)
    _check_out(out, adapter, "merge")
    if model is None:
        model = ModelSection(id=str(adapter.absolute())) if whole else _named_base(adapter, config)
    base = resolve(model)
    trained_on = read_manifest(adapter).get("inputs", {}).get("base", {}).get("sha256")
    if trained_on and trained_on != base.digest and not whole:
        raise InputError(
            f"{model.id} is not the base that the adapter was trained on ({config.get('base_model_name_or_path')}): "
            "their files differ",
            where=adapter,
            fix="give the very base: --base MODEL",
        )
    tokenizer = load_tokenizer(base.path, trust_remote_code=model.trust_remote_code)
    texts = [turn["content"] for conversation in CONVERSATIONS for turn in conversation]
    rows = [ids for text in texts if (ids := tokenizer(text, add_special_tokens=False)["input_ids"])]
    section = MergeSection(onto=onto)
    work = Work("merge", {"base": {"id": base.id, "sha256": base.digest}}, section.model_dump())
    held = lease(adapter, "edgetune merge"), lease(base.path, "edgetune merge")
    with held[0], held[1], tempfile.TemporaryDirectory(prefix="edgetune-") as report, staged_folder(out) as merged:
        found = merge(
            section,
            base,
            adapter,
            rows,
            trust_remote_code=model.trust_remote_code,
            report=Path(report),
            merged=merged,
            validation=_validation(adapter, base, model, data),
        )
        seal(merged, work)
    return {"path": str(out), **found}


def _named_base(adapter: Path, config: dict[str, Any]) -> ModelSection:
    """The base that an adapter's configuration names."""
    named = config.get("base_model_name_or_path")
    if not named:
        raise InputError("the adapter does not name its base", where=adapter, fix="give it: --base MODEL")
    of_hub = "/" in str(named) and ":" not in str(named)
    return ModelSection(id=str(named), revision=config.get("revision") if of_hub else None)


def _validation(adapter: Path, base: Base, model: ModelSection, data: Path | None) -> list[Encoded]:
    """The rows on which a qlora adapter's two bases are compared; none for other adapters, or where none are known."""
    from edgetune.data.examine import encode_any
    from edgetune.data.render import Renderer
    from edgetune.models import context_length, load_tokenizer, stop_ids
    from edgetune.train.merge import LOSS_ROWS
    from edgetune.train.method import QUANTIZATION

    beside = adapter.absolute().parent / "data" / "validation.jsonl"
    file = data or (beside if beside.is_file() else None)
    if file is None or not (adapter / QUANTIZATION).is_file():
        return []
    template = adapter / "chat_template.jinja"
    tokenizer = load_tokenizer(
        base.path,
        trust_remote_code=model.trust_remote_code,
        chat_template=str(template) if template.is_file() else None,
    )
    renderer = Renderer(tokenizer, set(stop_ids(base.path)))
    _, train_on = _settings(adapter.absolute().parent)
    return encode_any(file, renderer, train_on, context_length(base.path), LOSS_ROWS)


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
    from edgetune.export.card import describe
    from edgetune.export.package import export
    from edgetune.export.targets import load_target
    from edgetune.models import resolve

    require_extra("export")
    target = load_target(section.target)
    _check_out(out, merged, "export")
    base = resolve(ModelSection(id=str(merged.absolute())))
    named = name or (out.parent.name if out.name == "artifact" else out.name)
    options = {
        "target": target.model_dump(exclude={"description", "needs"}),
        "max_length": section.max_length,
        "name": named,
    }
    work = Work("export", {"merged": base.digest}, options)
    held = lease(merged, "edgetune export")
    with held, tempfile.TemporaryDirectory(prefix="edgetune-") as report, staged_folder(out) as artifact:
        found = export(
            merged,
            target,
            section.max_length,
            name=named,
            chain={"base": describe(base)},
            work=work,
            trust_remote_code=False,
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
        out: folder that gets report.json, or None; what else lies in it stays.

    Returns:
        The report of `edgetune.export.verify.verify`, with `path`.
    """
    from edgetune.data.examine import encode_any
    from edgetune.data.render import Renderer
    from edgetune.export.verify import verify
    from edgetune.models import load_tokenizer, stop_ids
    from edgetune.runtime.artifact import open_artifact

    require_extra("export")
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
    if opened.manifest.get("inputs", {}).get("merged") not in _digests(against):
        say(f"note: {opened.name} was not made from {against}, says its manifest; comparing them all the same")
    section, train_on = _settings(run)
    limited = section.limits.model_copy(update=limits)
    section = section.model_copy(update={"rows": rows or section.rows, "limits": limited})
    renderer = Renderer(load_tokenizer(against), set(stop_ids(against)))
    encoded = encode_any(held_out, renderer, train_on, opened.max_length, section.rows)
    with (
        lease(opened.path, "edgetune verify"),
        lease(against, "edgetune verify"),
        tempfile.TemporaryDirectory(prefix="edgetune-") as folder,
    ):
        found = verify(opened.path, against, encoded, section, Path(folder))
    if out is not None:
        write_json(out / "report.json", found)
    return {"path": str(opened.path), **found}


def _digests(merged: Path) -> set[str]:
    """How an artifact's manifest may name this folder: by its own manifest, or by its files."""
    from edgetune.models import resolve

    entries = read_manifest(merged).get("outputs", {})
    sealed = digest({name: entry["sha256"] for name, entry in entries.items() if name not in NOT_CONTENT})
    return {sealed, resolve(ModelSection(id=str(merged.absolute()))).digest}


def _settings(run: Path) -> tuple[VerifySection, Any]:
    """What the recipe of the run around an artifact says of verifying; the defaults where there is none."""
    try:
        recipe = Recipe.model_validate_json((run / "recipe.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return VerifySection(), DataSection(train="").train_on
    return recipe.verify, recipe.data.train_on


def _check_out(out: Path, source: Path, stage: str) -> None:
    """Refuse an output folder that is, holds or lies in the input, lies in a run, or holds anything but an earlier output."""
    new, old = out.absolute().resolve(), source.absolute().resolve()
    if new == old or new in old.parents or old in new.parents:
        raise InputError(
            "the output folder would overwrite the input", where=out, fix="choose another folder: --out FOLDER"
        )
    if (out.parent / "recipe.json").is_file() and out.name in FOLDERS[stage]:
        fix = f"choose another folder (--out FOLDER), or let the run do it: edgetune run RECIPE --from {stage}"
        raise InputError("belongs to a run, whose other stages rest on it", where=out, fix=fix)
    if out.exists() and not out.is_dir():
        raise InputError("is a file", where=out, fix="choose a folder: --out FOLDER")
    if out.is_dir() and any(out.iterdir()) and read_manifest(out).get("stage") != stage:
        fix = "choose an empty or a new folder: --out FOLDER"
        raise InputError(f"holds files that are no earlier output of edgetune {stage}", where=out, fix=fix)
