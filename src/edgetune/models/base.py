"""What a base model is: a transformers folder, where it came from, and the hashes of what is loaded."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgetune.files import HashCache, digest

Source = Literal["hub", "folder", "gguf", "package"]

_SUFFIXES = {".safetensors", ".json", ".jinja", ".model", ".tiktoken", ".py"}
_NAMES = {"vocab.txt", "merges.txt"}
_NOT_MODEL = {"manifest.json", "report.json"}


@dataclass(frozen=True)
class Base:
    """A base model that is ready to load.

    Attributes:
        path: folder with config.json, *.safetensors and the tokenizer's files.
        id: what the recipe asked for: hub id, absolute folder, absolute GGUF file, `package:NAME`.
        source: which of these it is.
        revision: the commit of a hub model, the version of a package, None for files.
        license: as its author states it (`apache-2.0`), None when nothing says.
        files: name relative to `path` → hex SHA-256, of every file that is loaded from the folder.
        upstream: the hub id of the model that a package or a GGUF file carries, where it is known.
    """

    path: Path
    id: str
    source: Source
    revision: str | None
    license: str | None
    files: dict[str, str]
    upstream: str | None = None

    @property
    def digest(self) -> str:
        """One hex SHA-256 of the model's content; equal for equal files, wherever they lie."""
        return digest(self.files)


def model_files(folder: Path) -> list[Path]:
    """The files of a folder that decide what is loaded: config, weights, tokenizer, templates, code."""
    found = [
        path
        for path in folder.iterdir()
        if not path.name.startswith(".")
        and path.name not in _NOT_MODEL
        and (path.suffix in _SUFFIXES or path.name in _NAMES)
        and path.is_file()
    ]
    return sorted([*found, *folder.glob("additional_chat_templates/*.jinja")])


def file_hashes(folder: Path) -> dict[str, str]:
    """Relative POSIX name → hex SHA-256 of each of `model_files`; unchanged files are not read again."""
    cache = HashCache()
    hashes = {path.relative_to(folder).as_posix(): cache.file(path) for path in model_files(folder)}
    cache.save()
    return hashes


def stated_license(folder: Path) -> str | None:
    """The licence that the model card's front matter states, or None."""
    import yaml

    with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
        text = (folder / "README.md").read_text(encoding="utf-8")
        if not text.startswith("---"):
            return None
        front = yaml.safe_load(text.split("---", 2)[1])
        if isinstance(front, dict):
            return license_text(front.get("license"), front.get("license_name"))
    return None


def license_text(license: object, name: object = None) -> str | None:
    """A model card's licence entry as text: a list is joined, `other` gives way to its name."""
    if isinstance(license, list):
        return ", ".join(str(item) for item in license) or None
    if license == "other" and name:
        return str(name)
    return str(license) if license else None
