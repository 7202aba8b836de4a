"""An encoder's or a sequence-to-sequence model's artifact, verified."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.errors import InputError
from edgetune.files import read_json
from edgetune.runtime.artifact import GOLDEN_FORMAT
from edgetune.runtime.plain.description import FILE, Description, described

_AGAIN = "copy the artifact again, or export it again"


@dataclass(frozen=True)
class PlainArtifact:
    """A verified artifact.

    Attributes:
        path: its folder, absolute, links resolved.
        manifest: manifest.json.
        description: model.json.
        golden: texts with the token ids that the model's own tokenizer gives them.
    """

    path: Path
    manifest: dict[str, Any]
    description: Description
    golden: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def name(self) -> str:
        """The name that the export gave it, else its folder's."""
        return str(self.manifest.get("name") or self.path.name)


def read_plain(folder: Path, manifest: dict[str, Any]) -> PlainArtifact:
    """Read the descriptions of an artifact whose files are verified.

    Args:
        folder: the artifact's, links resolved.
        manifest: its manifest.json.

    Raises:
        InputError: a description is not of this format, or a file that it needs is not listed.
    """
    for name in (FILE, "golden.json", "tokenizer.json"):
        _listed(name, folder, manifest)
    description = described(read_json(folder / FILE), folder / FILE)
    if description.task != manifest.get("task"):
        what = f"says {description.task}, the manifest says {manifest.get('task')}"
        raise InputError(what, where=folder / FILE, fix=_AGAIN)
    for name in description.graphs:
        _listed(name, folder, manifest)
    golden = read_json(folder / "golden.json")
    try:
        assert golden["format"] == GOLDEN_FORMAT
        texts = tuple((str(entry["text"]), tuple(map(int, entry["ids"]))) for entry in golden["texts"])
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise InputError("has no golden texts", where=folder / "golden.json", fix=_AGAIN) from error
    return PlainArtifact(folder, manifest, description, texts)


def _listed(name: str, folder: Path, manifest: dict[str, Any]) -> None:
    if name not in manifest["outputs"]:
        raise InputError(f"the manifest does not list {name}", where=folder, fix=_AGAIN)
