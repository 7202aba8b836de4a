"""Where a model comes from: its base, the data it was trained on, the adapter. Manifests of merged models and artifacts
carry it, cards and bills of materials tell of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.data.examine import train_files, validation_files
from edgetune.files import digest
from edgetune.run import NOT_CONTENT, RunFolder, read_manifest

if TYPE_CHECKING:
    from edgetune.models import Base
    from edgetune.recipe import Recipe

_PREPARED = ("train.jsonl", "validation.jsonl")


def describe(base: Base) -> dict[str, Any]:
    """The base model as manifests and cards tell of it: `id`, `source`, `revision`, `license`, `upstream`, `sha256`."""
    found = {name: value for name, value in asdict(base).items() if name not in ("path", "files")}
    if base.source in ("folder", "gguf"):
        found["id"] = Path(base.id).name  # an artifact carries no path of this machine
    return {**found, "sha256": base.digest}


def of_training(folder: RunFolder, recipe: Recipe, base: Base) -> dict[str, Any]:
    """The chain of a run whose data is prepared.

    Returns:
        `base` (see `describe`; what a merged model was made from, where the run begins with one), `data` (digest of the
        prepared rows), `data_files` (`name` and `sha256` of the files that were given and of the rows made of them).
    """
    before, given = of_folder(base), read_manifest(folder.output("data"))
    outputs = given.get("outputs", {})
    files = [(one["name"], one["sha256"]) for one in before.get("data_files", ())]
    for side, paths in (
        ("train rows", train_files(recipe.data)),
        ("validation rows", validation_files(recipe.data)),
    ):
        files += [
            (path.name, sha256) for path, sha256 in zip(paths, given.get("inputs", {}).get(side, ()), strict=False)
        ]
    files += [(f"data/{name}", outputs[name]["sha256"]) for name in _PREPARED if name in outputs]
    return {
        "base": before["base"],
        "data": folder.content("data"),
        "data_files": [{"name": name, "sha256": sha256} for name, sha256 in dict.fromkeys(files)],
    }


def of_run(folder: RunFolder, recipe: Recipe, base: Base) -> dict[str, Any]:
    """The chain of a run whose training is done: that of `of_training`, and `adapter` (digest)."""
    return {**of_training(folder, recipe, base), "adapter": folder.content("train")}


def of_adapter(adapter: Path, base: Base) -> dict[str, Any]:
    """The chain of an adapter's folder, as its own training tells it; the base alone where another tool made it."""
    manifest = read_manifest(adapter)
    known, outputs = manifest.get("chain"), manifest.get("outputs", {})
    if not known:
        return {"base": describe(base)}
    content = {name: entry["sha256"] for name, entry in outputs.items() if name not in NOT_CONTENT}
    return {**known, "adapter": digest(content)}


def of_adapters(adapters: Sequence[Path], base: Base) -> dict[str, Any]:
    """The chain of adapters that stay beside their base: the data of all of them."""
    found = [of_adapter(adapter, base) for adapter in adapters]
    data = [one["data"] for one in found if "data" in one]
    if not data:
        return {"base": describe(base)}
    files = [file for one in found for file in one.get("data_files", ())]
    unlike = [file for at, file in enumerate(files) if file not in files[:at]]
    return {"base": describe(base), "data": data[0] if len(data) == 1 else digest(data), "data_files": unlike}


def of_folder(model: Base) -> dict[str, Any]:
    """The chain of a transformers folder: what the manifest of a merged model says of it; itself as the base else.

    A folder whose files are not those of its manifest any more is another model.
    """
    manifest = read_manifest(model.path)
    outputs = {name: entry["sha256"] for name, entry in manifest.get("outputs", {}).items()}
    known: dict[str, Any] = manifest.get("chain") or {}
    if not known.get("base") or any(outputs.get(name) != sha256 for name, sha256 in model.files.items()):
        return {"base": describe(model)}
    return known
