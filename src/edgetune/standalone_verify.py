"""Verify alone: any two models of one vocabulary, in folders that someone else may have made."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.errors import InputError, require_extra
from edgetune.files import digest, write_json
from edgetune.leases import lease
from edgetune.progress import say
from edgetune.recipe import DataSection, ModelSection, Recipe, VerifySection
from edgetune.run import NOT_CONTENT, read_manifest

if TYPE_CHECKING:
    from edgetune.data.render import Encoded, Renderer, TrainOn


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
        provider: where the artifact runs, as targets have it; what it was made for when not given.
        adapter: of an artifact that carries adapters, which one is on; `none`: the base; its only one when not given.

    Returns:
        The report of `edgetune.export.verify.verify`, with `path` and `against`. The card of an artifact of edgetune's own
        that was made from `merged` has its numbers then.
    """
    from edgetune.data.render import Renderer
    from edgetune.export.card import stamp
    from edgetune.export.readers import adapter_of, ends, longest, model_at, provider_of
    from edgetune.export.targets import limits_of
    from edgetune.export.verify import verify
    from edgetune.models import load_tokenizer

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
    another = _tell_of_another_origin(found, against)
    switched = adapter_of(found, adapter)
    section, train_on = settings_beside(run)
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
    bare = switched is None and "adapters" in read_manifest(found)  # its card tells of an adapter
    stamp(found, "verify", report, only_device=another or bare or in_run(found))
    return {"path": str(found), "against": str(against), **report}


def in_run(artifact: Path) -> bool:
    """Whether an artifact is a run's, which writes its card itself."""
    return artifact.name == "artifact" and (artifact.parent / "recipe.json").is_file()


def _tell_of_another_origin(artifact: Path, merged: Path) -> bool:
    """Whether the artifact's own manifest names another model, which is said."""
    from edgetune.export.readers import is_graph

    manifest = read_manifest(artifact)
    made_from = manifest.get("inputs", {}).get("merged")
    if is_graph(merged):
        return True
    if made_from and made_from not in _digests(merged):
        name = manifest.get("name") or artifact.name
        say(f"note: {name} was not made from {merged}, says its manifest; comparing them all the same")
        return True
    return False


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


def settings_beside(run: Path) -> tuple[VerifySection, Any]:
    """What the recipe of the run around a folder says: its `verify` section, and `data.train_on`. Defaults without one."""
    try:
        recipe = Recipe.model_validate_json((run / "recipe.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return VerifySection(), DataSection(train="").train_on
    return recipe.verify, recipe.data.train_on
