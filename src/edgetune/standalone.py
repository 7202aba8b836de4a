"""A stage alone, on folders that someone else may have made: merge, export, verify."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgetune.errors import InputError, require_extra
from edgetune.files import digest, read_json, staged_folder, write_json
from edgetune.leases import lease
from edgetune.progress import say
from edgetune.recipe import DataSection, ExportSection, MergeSection, ModelSection, Recipe, VerifySection
from edgetune.run import FOLDERS, MANIFEST, NOT_CONTENT, Result, Work, read_manifest, seal

if TYPE_CHECKING:
    from edgetune.data.render import Encoded, Renderer, TrainOn
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


def export_model(
    merged: Path,
    out: Path,
    section: ExportSection,
    name: str | None = None,
    data: Path | None = None,
    adapters: Sequence[str] = (),
) -> dict[str, Any]:
    """Make an artifact of a transformers folder, or of a base with adapters that are switched at run time.

    Args:
        merged: the folder; with `adapters` their base, in any form that `model.id` has.
        out: the artifact; replaced as a whole.
        section: target and context.
        name: the artifact's name; the name of `out`'s folder when not given.
        data: examples in any form, for a target that calibrates; the training rows that lie beside the folder (of
            adapters: beside the first) in its run when not given.
        adapters: each `NAME=FOLDER`, or a folder: an adapter, or the run that holds it.

    Returns:
        The report of `edgetune.export.package.export`, with `path`.

    Raises:
        InputError: the model cannot be exported so, or an adapter cannot stay beside it.
    """
    from edgetune.export.adapters.base import adapted_base
    from edgetune.export.adapters.read import Adapter, require_separable
    from edgetune.export.card import describe
    from edgetune.export.package import export
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
    base = resolve(ModelSection(id=str(merged.absolute() if merged.exists() else merged)))
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
            chain={"base": describe(base)},
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
    return Examples(encode_any(data, renderer, "assistant", context_length(merged), most), heal)


def verify_artifact(
    artifact: Path,
    merged: Path | None,
    data: Path | None,
    rows: int | None,
    limits: dict[str, float],
    out: Path | None,
    *,
    step: int | None = None,
    provider: str | None = None,
    adapter: str | None = None,
) -> dict[str, Any]:
    """Compare an artifact with the model that it was made from, or any two models of one vocabulary.

    Args:
        artifact: artifact or run folder; a folder of another tool's with genai_config.json; a transformers folder, a GGUF
            file, or `package:NAME`.
        merged: any of these; `merged` beside the artifact when not given.
        data: examples in any form; `data/validation.jsonl` beside the artifact, or beside `merged`, when not given.
        rows: how many; the run's own recipe decides when not given.
        limits: limits that replace the run's or the default ones.
        out: folder that gets report.json, or None; what else lies in it stays.
        step: tokens of a row that are fed to the artifact at once; the run's own recipe decides when not given.
        provider: where the artifact runs, as targets have it; what it was made for when not given. The card of edgetune's
            own artifacts says so when that was done.
        adapter: of an artifact that carries adapters, which one is on; `none`: the base; its only one when not given.

    Returns:
        The report of `edgetune.export.verify.verify`, with `path` and `against`.
    """
    from edgetune.data.render import Renderer
    from edgetune.export.card import stamp
    from edgetune.export.readers import ends, longest, provider_of
    from edgetune.export.targets import limits_of
    from edgetune.export.verify import verify
    from edgetune.models import load_tokenizer
    from edgetune.runtime.artifact import Artifact

    require_extra("export")
    found = model_at(artifact, "artifact")
    provider = provider_of(found, provider)
    run = found.parent
    if merged is None and not (run / "merged").is_dir():
        raise InputError("no merged model lies beside the artifact", where=found, fix="name it: --against FOLDER")
    against = model_at(merged or run / "merged", "merged")
    beside = [folder / "data" / "validation.jsonl" for folder in (run, against.parent)]
    held_out = data or next((file for file in beside if file.is_file()), None)
    if held_out is None:
        raise InputError(
            "no held-out rows lie beside the artifact",
            where=found,
            fix="name a file of examples: --data FILE",
        )
    _tell_of_another_origin(found, against)
    switched = Artifact(found, read_manifest(found), {}, {}).adapter(adapter)
    section, train_on = _settings(run)
    if not (run / "recipe.json").is_file():
        section = section.model_copy(update={"limits": limits_of(found)})
    changes = {"rows": rows, "step": step, "limits": section.limits.model_copy(update=limits)}
    section = section.model_copy(update={name: value for name, value in changes.items() if value is not None})
    renderer = Renderer(load_tokenizer(against), set(ends(against)))
    limit = min(longest(found), longest(against))
    encoded, places = _rows_of(held_out, renderer, train_on, limit, section.rows)
    with (
        lease(found, "edgetune verify"),
        lease(against, "edgetune verify"),
        tempfile.TemporaryDirectory(prefix="edgetune-") as folder,
    ):
        report = verify(
            found, against, encoded, section, Path(folder), provider=provider, places=places, adapter=switched
        )
    if out is not None:
        write_json(out / "report.json", report)
    stamp(found, report)
    return {"path": str(found), "against": str(against), **report}


def model_at(path: Path, output: Literal["artifact", "merged"]) -> Path:
    """The folder of a model that is to be compared, checked as far as its files can be.

    Args:
        path: a folder with genai_config.json, whose hashes are verified where it has edgetune's manifest; a transformers
            folder; a GGUF file; `package:NAME`; a run.
        output: which of a run's folders is meant.

    Raises:
        InputError: it is none of these, or broken.
    """
    from edgetune.export.readers import is_graph
    from edgetune.models import resolve
    from edgetune.models.packaged import PREFIX
    from edgetune.runtime.artifact import open_artifact

    if (path / "recipe.json").is_file() and (path / output).is_dir():
        path = path / output
    if is_graph(path):
        made_here = (path / MANIFEST).is_file() and str(_format(path)).startswith("edgetune/")
        return open_artifact(path).path if made_here else path.resolve()
    if path.is_file() or (path / "config.json").is_file() or str(path).startswith(PREFIX):
        return resolve(ModelSection(id=str(path))).path
    if output == "artifact":
        return open_artifact(path).path  # says what it is instead
    return resolve(ModelSection(id=str(path.absolute()))).path  # likewise


def _format(folder: Path) -> Any:
    found = read_json(folder / MANIFEST)
    return found.get("format") if isinstance(found, dict) else None


def _tell_of_another_origin(artifact: Path, merged: Path) -> None:
    """Say so where the artifact's own manifest names another model."""
    from edgetune.export.readers import is_graph

    manifest = read_manifest(artifact)
    made_from = manifest.get("inputs", {}).get("merged")
    if made_from and not is_graph(merged) and made_from not in _digests(merged):
        name = manifest.get("name") or artifact.name
        say(f"note: {name} was not made from {merged}, says its manifest; comparing them all the same")


def _rows_of(
    file: Path, renderer: Renderer, train_on: TrainOn, limit: int, rows: int
) -> tuple[list[Encoded], list[str]]:
    """The first rows of a file of examples, encoded, and where each stands, as file:line."""
    from edgetune.data.examine import encode_any
    from edgetune.data.problems import Problems
    from edgetune.data.read import read

    encoded = encode_any(file, renderer, train_on, limit, rows)  # raises where a row cannot be used: none is left out
    return encoded, [row.where for row in itertools.islice(read(file, Problems(), file.name), rows)]


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
