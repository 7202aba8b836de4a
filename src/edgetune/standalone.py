"""A stage alone, on folders that someone else may have made: merge, export, repair."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgetune.errors import InputError, require_extra
from edgetune.files import staged_folder
from edgetune.leases import lease
from edgetune.recipe import ExportSection, MergeSection, ModelSection
from edgetune.run import FOLDERS, Result, Work, read_manifest, seal
from edgetune.standalone_verify import settings_beside

if TYPE_CHECKING:
    from edgetune.data.render import Encoded
    from edgetune.export.quantized import Examples
    from edgetune.models import Base
    from edgetune.recipe import HealSection


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
    from edgetune.chain import of_adapter
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
        seal(merged, work, chain=of_adapter(adapter, base))
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
    _, train_on = settings_beside(adapter.absolute().parent)
    return encode_any(file, renderer, train_on, context_length(base.path), LOSS_ROWS)


def export_model(
    merged: Path,
    out: Path,
    section: ExportSection,
    name: str | None = None,
    data: Path | None = None,
    adapters: Sequence[str] = (),
) -> dict[str, Any]:
    """Make an artifact of a transformers folder, or of a base with adapters that are switched at run time.

    An encoder or a sequence-to-sequence model becomes one for plain ONNX Runtime; see `edgetune.export.plain`.

    Args:
        merged: the folder; with `adapters` their base, in any form that `model.id` has.
        out: the artifact; replaced as a whole.
        section: target and context.
        name: the artifact's name; the name of `out`'s folder when not given.
        data: examples in any form, for a target that calibrates; the training rows that lie beside the folder (of
            adapters: beside the first) in its run when not given. Of an encoder or a sequence-to-sequence model: rows that
            the artifact is compared on.
        adapters: each `NAME=FOLDER`, or a folder: an adapter, or the run that holds it.

    Returns:
        The report of `edgetune.export.package.export`, or of `edgetune.export.plain.package.export_plain`, with `path`.

    Raises:
        InputError: the model cannot be exported so, or an adapter cannot stay beside it.
    """
    from edgetune.chain import of_adapters, of_folder
    from edgetune.export.adapters.base import adapted_base
    from edgetune.export.adapters.read import Adapter, require_separable
    from edgetune.export.package import export
    from edgetune.export.plain.kinds import task_of
    from edgetune.export.plain.package import export_plain
    from edgetune.export.preflight import preflight, require_room_for
    from edgetune.export.quantized import Examples
    from edgetune.export.targets import target_of
    from edgetune.models import resolve

    require_extra("export")
    target = target_of(section)
    given = [_adapter_at(text) for text in adapters]
    if given:
        require_extra("train")
        require_separable(target)
    for source in [merged, *(folder for _, folder in given)]:
        _check_out(out, source, "export")
    require_room_for(merged, target, out, steps=section.heal.steps)
    base = resolve(ModelSection(id=str(merged.absolute() if merged.exists() else merged)))
    task = task_of(base.path)
    if task and given:
        raise InputError(
            f"a model for {task} has no adapters that are switched", where="--adapter", fix="merge it first"
        )
    named = name or (out.parent.name if out.name == "artifact" else out.name)
    options = {
        "target": target.options_of_work(),
        "max_length": section.max_length,
        "name": named,
    }
    beside = given[0][1] if given else merged
    with contextlib.ExitStack() as stack:
        stack.enter_context(lease(base.path, "edgetune export"))
        report = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgetune-")))
        artifact = stack.enter_context(staged_folder(out))
        inputs: dict[str, Any] = {"merged": base.digest}
        if task:
            told: dict[str, Any] = {
                "name": named,
                "chain": of_folder(base),
                "work": Work("export", inputs, options),
            }
            plain = export_plain(base.path, task, target, section.max_length, **told, artifact=artifact, data=data)
            return {"path": str(out), **plain}
        template = given[0][1] / "chat_template.jinja" if given else None  # of the adapters' training
        preflight(
            base.path,
            target,
            section.max_length,
            out,
            steps=section.heal.steps,
            chat_template=str(template) if template and template.is_file() else None,
        )
        model, beside_it = base.path, list[Adapter]()
        if given:
            for _, folder in given:
                stack.enter_context(lease(folder, "edgetune export"))
            model, beside_it = stack.enter_context(adapted_base(base, given, artifact.parent))
            inputs = {"base": base.digest, "adapters": {adapter.name: adapter.digest for adapter in beside_it}}
        found = export(
            model,
            target,
            section.max_length,
            name=named,
            chain=of_adapters([folder for _, folder in given], base) if given else of_folder(base),
            work=Work("export", inputs, options),
            trust_remote_code=False,
            artifact=artifact,
            report=report,
            examples=_examples(
                model, data or _rows_beside(beside), Examples.wanted(target, section.heal), section.heal
            ),
            adapters=beside_it,
        )
    return {"path": str(out), **found}


def _adapter_at(text: str) -> tuple[str, Path]:
    """The name and the folder of `NAME=FOLDER`; the name of the run, or of the folder, where none is given."""
    name, equals, rest = text.partition("=")
    folder = Path(rest if equals else text)
    if (folder / "adapter").is_dir() and not (folder / "adapter_config.json").is_file():
        folder = folder / "adapter"
    place = folder.absolute()
    return (name if equals else place.parent.name if place.name == "adapter" else place.name), folder


def _rows_beside(folder: Path) -> Path | None:
    """The training rows of the run that a folder lies in."""
    found = folder.absolute().parent / "data" / "train.jsonl"
    return found if found.is_file() else None


def _examples(merged: Path, data: Path | None, rows: int | None, heal: HealSection) -> Examples:
    """Rows of the file, as many as are wanted."""
    from edgetune.data.examine import encode_any
    from edgetune.data.render import Renderer
    from edgetune.export.quantized import Examples
    from edgetune.models import context_length, load_tokenizer, stop_ids

    if rows == 0 or data is None:
        return Examples()
    renderer = Renderer(load_tokenizer(merged), set(stop_ids(merged)))
    most = sys.maxsize if rows is None else rows
    found = encode_any(data, renderer, "assistant", context_length(merged), most, side="training")
    return Examples(found, heal, where=str(data))


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


def heal_run(run: Path, steps: int, overrides: Sequence[str] = ()) -> Result:
    """Make a run's artifact again, its codes and scales repaired, and verify it.

    Args:
        run: the run folder, with its data and its merged model.
        steps: of `export.heal`.
        overrides: `key=value`, in place of what the run's recipe says.

    Raises:
        InputError: not a run, or one without a merged model; a target that does not quantize; an override of nothing.
    """
    from edgetune.export.targets import target_of, trained_through
    from edgetune.pipeline import Pipeline
    from edgetune.recipe_file import load

    if not (run / "recipe.json").is_file():
        raise InputError("is not a run", where=run, fix="name a run folder: `edgetune runs ls` lists them")
    place = run if run.name else run.absolute()
    where = [f"runs_dir={json.dumps(str(place.parent))}", f"name={json.dumps(place.name)}"]
    loaded = load(str(run / "recipe.json"), [f"export.heal.steps={steps}", *overrides, *where])
    if target_of(loaded.recipe.export).quantization is None:
        raise InputError(
            f"{loaded.recipe.export.target} is no target of edgetune's own quantization, so there is nothing to heal",
            where="export.target",
            fix="name one that is: export.target=cpu-int4",
        )
    trained = trained_through(load(str(run / "recipe.json"), where).recipe)
    if (wanted := trained_through(loaded.recipe)) and wanted != trained:
        raise InputError(
            f"the run was not trained through the grids of {loaded.recipe.export.target}",
            where="export.target",
            fix="train it so (`edgetune run RECIPE` with this target), or add train.quantization_aware=false",
        )
    return Pipeline(loaded).again("export", "verify")
