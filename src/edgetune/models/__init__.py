"""Where base models come from: a hub id, a folder, a GGUF file, or weights that a package carries.

`resolve` turns each into the same thing, a transformers folder that was checked; `load_tokenizer` and
`load_model` open it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from edgetune.errors import InputError
from edgetune.models.base import Base, file_hashes, need, stated_license
from edgetune.models.check import check_folder
from edgetune.models.load import context_length, load_model, load_tokenizer, stop_ids

if TYPE_CHECKING:
    from edgetune.recipe import ModelSection

__all__ = [
    "Base",
    "check_folder",
    "context_length",
    "load_model",
    "load_tokenizer",
    "local",
    "resolve",
    "stop_ids",
]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve(section: ModelSection) -> Base:
    """The base model that a recipe names, as a folder ready to load; downloads and converts what is missing.

    Args:
        section: `model:` of the recipe. A folder or file that exists goes before a hub id of the same name.

    Raises:
        InputError: there is no such model, it cannot be reached, or it is broken, with what to do about it.
    """
    from edgetune.models import gguf, hub, packaged

    id = section.id.strip()
    path = Path(id).expanduser()
    trusted = section.trust_remote_code
    is_hub = not (id.startswith(packaged.PREFIX) or path.suffix.lower() == ".gguf" or path.exists()) and bool(
        _HUB_ID.fullmatch(id)
    )
    if section.revision and not is_hub:
        raise InputError("`revision` is for hub ids only", where="model.revision", fix=f"remove it; {id} is no hub id")
    if is_hub:
        need("huggingface_hub")
        return hub.from_hub(id, section.revision, trust_remote_code=trusted)
    if id.startswith(packaged.PREFIX):
        return packaged.from_package(id)
    if path.suffix.lower() == ".gguf":
        return gguf.from_file(path.absolute())
    return _from_folder(path.absolute(), trusted)


def local(section: ModelSection) -> Base | None:
    """The base model if it is on this machine already, else None; nothing is fetched or converted.

    Raises:
        InputError: it is here, but broken.
    """
    from edgetune.models import gguf, hub, packaged

    path = Path(section.id.strip()).expanduser()
    if section.id.startswith(packaged.PREFIX):
        return packaged.kept(section.id)
    if path.suffix.lower() == ".gguf":
        return gguf.kept(path.absolute())
    if path.exists():
        return resolve(section)
    return hub.kept(section.id, section.revision, trust_remote_code=section.trust_remote_code)


def _from_folder(folder: Path, trusted: bool) -> Base:
    if not folder.exists():
        raise InputError(
            "no such folder",
            where=folder,
            fix="check `model.id`: a folder, a .gguf file, package:NAME, or a hub id ORGANISATION/NAME",
        )
    check_folder(folder, trust_remote_code=trusted)
    return Base(
        path=folder,
        id=str(folder),
        source="folder",
        revision=None,
        license=stated_license(folder),
        files=file_hashes(folder),
    )
