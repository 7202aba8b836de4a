"""Where base models come from: a hub id, a folder, a GGUF file, or weights that a package carries.

`resolve` turns each into the same thing, a transformers folder that was checked; `load_tokenizer` and
`load_model` open it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from edgetune.errors import InputError, need
from edgetune.models.base import Base, Source, file_hashes, stated_license
from edgetune.models.check import check_folder
from edgetune.models.load import context_length, explained, load_config, load_model, load_tokenizer, stop_ids

if TYPE_CHECKING:
    from edgetune.recipe import ModelSection

__all__ = [
    "Base",
    "check_folder",
    "context_length",
    "explained",
    "load_config",
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
        section: `model:` of the recipe. A folder or file that exists goes before a hub id of the same name. The hub
            is not asked about a commit that is here: with `revision` set to `Base.revision`, a second call for the
            same model needs no network.

    Raises:
        InputError: there is no such model, it cannot be reached, or it is broken, with what to do about it.
    """
    from edgetune.models import gguf, hub, packaged

    source, id = _source(section)
    if source == "hub":
        return hub.from_hub(id, section.revision, trust_remote_code=section.trust_remote_code)
    if source == "package":
        return packaged.from_package(id)
    if source == "gguf":
        return gguf.from_file(Path(id))
    return _from_folder(Path(id), section.trust_remote_code)


def local(section: ModelSection) -> Base | None:
    """The base model if it is on this machine, ready, else None. The network is not used, nothing is converted.

    Raises:
        InputError: it is here, but broken; or there is no such folder, file or package, so that nothing could be fetched.
    """
    from edgetune.models import gguf, hub, packaged

    source, id = _source(section)
    if source == "hub":
        return hub.cached(id, section.revision, trust_remote_code=section.trust_remote_code)
    if source == "package":
        return packaged.cached(id)
    if source == "gguf":
        return gguf.cached(Path(id))
    return _from_folder(Path(id), section.trust_remote_code)


def _source(section: ModelSection) -> tuple[Source, str]:
    """Which kind of model is meant, and its id; the absolute path of a folder or file. Raises InputError."""
    from edgetune.models import packaged

    id = section.id.strip()
    path = Path(id).expanduser()
    source: Source = "folder"
    if id.startswith(packaged.PREFIX):
        source = "package"
    elif path.suffix.lower() == ".gguf":
        source, id = "gguf", str(path.absolute())
    elif not path.exists() and _HUB_ID.fullmatch(id):
        need("huggingface_hub")
        return "hub", id
    else:
        id = str(path.absolute())
    if section.revision:
        raise InputError("`revision` is for hub ids only", where="model.revision", fix=f"remove it; {id} is no hub id")
    return source, id


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
