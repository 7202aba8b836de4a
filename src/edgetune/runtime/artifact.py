"""An artifact on disk: every file is checked against the manifest before anything is loaded."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from edgetune import progress
from edgetune.errors import InputError
from edgetune.files import read_json
from edgetune.run import FORMAT
from edgetune.runtime.plain.description import FILE, SEQ2SEQ, TASKS

if TYPE_CHECKING:
    from edgetune.runtime.plain.artifact import PlainArtifact

MANIFEST = "manifest.json"
GOLDEN_FORMAT = "edgetune/golden/1"
_NEEDED = ("genai_config.json", "golden.json", "tokenizer.json", "tokenizer_config.json")
# What ONNX Runtime (GenAI) would read though the manifest does not know it.
_READ_BY_RUNTIME = (
    "genai_config.json",
    FILE,
    "*.onnx",
    "*.data",
    "*.onnx_adapter",
    "*.model",
    "tokenizer*",
    "chat_template*",
    "special_tokens*",
    "added_tokens*",
    "vocab*",
    "merges*",
)
NO_ADAPTER = "none"  # asks for the base
_ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_BAR_FROM_BYTES = 1_000_000_000
_BLOCK = 4 << 20
_CALLS = {
    "feature-extraction": ".encode(texts)",
    "text-classification": ".classify(texts)",
    "token-classification": ".tag(texts)",
    "question-answering": ".answer(question, context)",
}
_AGAIN = "copy the artifact again, or export it again (`edgetune run … --from export`)"


@dataclass(frozen=True)
class Artifact:
    """A verified artifact.

    Attributes:
        path: its folder, absolute, links resolved.
        manifest: manifest.json.
        config: genai_config.json.
        golden: golden.json.
    """

    path: Path
    manifest: dict[str, Any]
    config: dict[str, Any]
    golden: dict[str, Any]

    @property
    def max_length(self) -> int:
        """Context in tokens, prompt and answer together."""
        return min(int(self.config["search"]["max_length"]), int(self.config["model"]["context_length"]))

    @property
    def last_logits_only(self) -> bool:
        """Whether the graph's head computes logits of a call's last position only (the builder's `prune_lm_head`)."""
        target = self.manifest.get("options", {}).get("target", {})
        return str(target.get("options", {}).get("prune_lm_head", "false")).lower() in ("true", "1")

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters that can be switched on, in the order in which they were exported."""
        return tuple(self.manifest.get("adapters", ()))

    @property
    def default_adapter(self) -> str | None:
        """The adapter that is on where none is named: the only one; None where there are none or several."""
        return self.adapters[0] if len(self.adapters) == 1 else None

    def adapter(self, name: str | None) -> str | None:
        """The adapter that `name` asks for, None for the base.

        Args:
            name: one of `adapters`; `none` for the base; None for `default_adapter`.

        Raises:
            InputError: there is no such adapter.
        """
        if name is None:
            return self.default_adapter
        if name == NO_ADAPTER:
            return None
        if name in self.adapters:
            return name
        known = f"it has {', '.join(self.adapters)}" if self.adapters else "it carries none"
        raise InputError(
            f"{self.name} has no adapter {name!r}: {known}",
            where="adapter",
            fix=f"name one of them, or {NO_ADAPTER} for the base"
            if self.adapters
            else "leave it out; `export.adapters: separate` exports adapters that can be switched",
        )

    @property
    def prefill_tokens(self) -> int:
        """Tokens of a prompt that go through the model in one call.

        Where the head gives logits of every position, this bounds their memory: 64 tokens in a call halve the peak of 1,500,
        cost no time, and give bit for bit the same logits. Where it gives those of the last one, 128 are faster.
        """
        return 128 if self.last_logits_only else 64

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Token ids that end an answer."""
        ids = self.config["model"]["eos_token_id"]
        return tuple(ids) if isinstance(ids, list) else (ids,)

    @property
    def name(self) -> str:
        """The name that the export gave it, else its folder's."""
        return str(self.manifest.get("name") or self.path.name)

    @property
    def size_mb(self) -> float:
        """Size of its files in MB (10^6 bytes), as the manifest has it."""
        return sum(entry["bytes"] for entry in self.manifest["outputs"].values()) / 1e6


def open_artifact(path: Path) -> Artifact:
    """Verify a decoder's artifact and read its descriptions; see `open_any`.

    Args:
        path: the artifact's folder, or the run folder that holds it.

    Raises:
        InputError: as `open_any`; or it is an encoder's or a sequence-to-sequence model's.
    """
    return require_decoder(open_any(path))


def require_decoder(artifact: Artifact | PlainArtifact) -> Artifact:
    """The artifact, where it is a decoder's; raises InputError where it is not."""
    if isinstance(artifact, Artifact):
        return artifact
    task = artifact.description.task
    raise InputError(
        f"is a model for {task}; chat, serve, bench, tune, verify and evaluate are for decoders (text-generation)",
        where=artifact.path,
        fix="`edgetune generate` answers with it" if task == SEQ2SEQ else f"from Python: load(PATH){_CALLS[task]}",
    )


def open_any(path: Path) -> Artifact | PlainArtifact:
    """Verify an artifact's files and read its descriptions.

    Every file that the manifest lists must lie inside the folder with its size and SHA-256, and nothing that
    ONNX Runtime would read may be missing from the manifest. Other files are left alone.

    Args:
        path: the artifact's folder, or the run folder that holds it.

    Raises:
        InputError: it is no artifact, or a file is missing, changed, unlisted, or lies outside the folder.
    """
    folder = _find(path)
    manifest = _manifest(folder)
    _verify(folder, manifest["outputs"])
    if manifest.get("task") in TASKS:
        from edgetune.runtime.plain.artifact import read_plain

        return read_plain(folder, manifest)
    config, golden = read_json(folder / "genai_config.json"), read_json(folder / "golden.json")
    _check_config(folder, config, manifest["outputs"])
    _check_golden_form(folder, golden)
    return Artifact(folder, manifest, config, golden)


def adapter_file(name: str) -> str:
    """The file of an adapter in an artifact."""
    return f"{name}.onnx_adapter"


def load_adapters(og: Any, model: Any, artifact: Artifact) -> Any:
    """The adapters of a loaded artifact, in memory: for `Generator.set_active_adapter` by name. None where it has none.

    Args:
        og: the module `onnxruntime_genai`.
        model: its model of the artifact.
        artifact: verified.
    """
    if not artifact.adapters:
        return None
    found = og.Adapters(model)
    for name in artifact.adapters:
        found.load(str(artifact.path / adapter_file(name)), name)
    return found


def _find(path: Path) -> Path:
    if not path.is_dir():
        what = "is a file; an artifact is a folder" if path.exists() else "no such folder"
        raise InputError(what, where=path, fix="`edgetune runs ls` lists the runs; the artifact is runs/NAME/artifact")
    folder = path.resolve()
    if (folder / MANIFEST).is_file():
        return folder
    if (folder / "artifact" / MANIFEST).is_file():  # a run folder stands for its artifact
        return (folder / "artifact").resolve()
    if (folder / "genai_config.json").is_file():
        raise InputError(
            "is not an edgetune artifact: without manifest.json there is nothing to check its files against",
            where=path,
            fix="export the model with edgetune (`edgetune export --help`)",
        )
    if any((folder / name).is_dir() for name in ("train", "merged", "adapter", "data")):
        raise InputError("this run has no artifact yet", where=path, fix="finish it: `edgetune run RECIPE`")
    raise InputError(
        "is not an artifact: it has no manifest.json", where=path, fix="give a folder that edgetune exported"
    )


def _manifest(folder: Path) -> dict[str, Any]:
    where = folder / MANIFEST
    found = read_json(where)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        kind = found.get("format") if isinstance(found, dict) else None
        raise InputError(
            f"the manifest's format is {kind!r}, not {FORMAT!r}",
            where=where,
            fix="export it with this edgetune",
        )
    outputs = found.get("outputs")
    if not isinstance(outputs, dict) or not all(_is_entry(entry) for entry in outputs.values()):
        raise InputError("the manifest does not list its files with sha256 and bytes", where=where, fix=_AGAIN)
    for name in outputs:
        _check_name(name, where)
    if not outputs.keys() & {"genai_config.json", FILE} and found.get("stage") not in (None, "export"):
        raise InputError(
            f"is what the stage {found['stage']} made, not an artifact",
            where=folder,
            fix=f"give {folder.parent / 'artifact'}",
        )
    _check_adapters(found.get("adapters", {}), outputs, where)
    for name in () if found.get("task") in TASKS else _NEEDED:
        if name not in outputs:
            raise InputError(f"the manifest does not list {name}", where=where, fix=_AGAIN)
    return found


def check_adapter_name(name: str, where: str | Path) -> None:
    """Raise InputError unless an adapter can have this name: on the command line, in a request, as a file's."""
    if not _ADAPTER_NAME.fullmatch(name) or name.lower() == NO_ADAPTER:
        why = "asks for no adapter" if name.lower() == NO_ADAPTER else "is no name for an adapter"
        raise InputError(
            f"{name!r} {why}",
            where=where,
            fix="use up to 100 letters, digits, `.`, `_` and `-`, a letter or a digit first",
        )


def _check_adapters(found: Any, outputs: dict[str, Any], where: Path) -> None:
    if not isinstance(found, dict):
        raise InputError("its `adapters` are no names with files", where=where, fix=_AGAIN)
    for name in found:
        check_adapter_name(name, where)
        if adapter_file(name) not in outputs:
            raise InputError(f"does not list the file of the adapter {name}", where=where, fix=_AGAIN)


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("sha256"), str)
        and isinstance(entry.get("bytes"), int)
        and not isinstance(entry["bytes"], bool)
    )


def _check_name(name: str, where: Path) -> None:
    """Refuse a name that can lead out of the folder on any system."""
    windows = PureWindowsPath(name)
    if not name or "\0" in name or "\\" in name or windows.drive or windows.root or ".." in PurePosixPath(name).parts:
        raise InputError(f"names a file outside the artifact: {name!r}", where=where, fix="do not use it; " + _AGAIN)


def _verify(folder: Path, outputs: dict[str, dict[str, Any]]) -> None:
    total = 0
    for name, entry in outputs.items():
        size = _inside(folder, name).st_size
        if size != entry["bytes"]:
            raise InputError(
                f"has {size:,} bytes; the manifest says {entry['bytes']:,}", where=folder / name, fix=_AGAIN
            )
        total += size
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if name not in outputs and not path.is_dir() and any(fnmatch.fnmatch(path.name, p) for p in _READ_BY_RUNTIME):
            raise InputError(
                "is not in the manifest, but ONNX Runtime would read it",
                where=path,
                fix="remove it; or " + _AGAIN,
            )
    if total < _BAR_FROM_BYTES:
        for name, entry in outputs.items():
            _compare(folder / name, entry["sha256"], _blocks(folder / name))
        return
    with progress.task("checking the artifact", total) as bar:
        for name, entry in outputs.items():
            _compare(folder / name, entry["sha256"], _blocks(folder / name, bar))


def _inside(folder: Path, name: str) -> os.stat_result:
    """The stat of a regular file in `folder`; a link may lead to another place in it, and nowhere else."""
    path = folder / name
    try:
        real = path.resolve(strict=True)
    except (FileNotFoundError, NotADirectoryError, RuntimeError) as error:
        what = "is a link that leads nowhere" if path.is_symlink() else "is missing"
        raise InputError(f"{what}; the manifest lists it", where=path, fix=_AGAIN) from error
    if not real.is_relative_to(folder):
        raise InputError(
            "is a link that leads out of the artifact",
            where=path,
            fix="put the file itself there; or " + _AGAIN,
        )
    found = real.stat()
    if not stat.S_ISREG(found.st_mode):
        raise InputError("is not a regular file", where=path, fix=_AGAIN)
    return found


def _blocks(path: Path, bar: progress.Task | None = None) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            yield block
            if bar:
                bar.advance(len(block))


def _compare(path: Path, wanted: str, blocks: Iterator[bytes]) -> None:
    found = hashlib.sha256()
    for block in blocks:
        found.update(block)
    if found.hexdigest() != wanted:
        raise InputError(
            "is not the file that was exported: its SHA-256 differs from the manifest", where=path, fix=_AGAIN
        )


def _check_config(folder: Path, config: Any, outputs: dict[str, Any]) -> None:
    where = folder / "genai_config.json"
    try:
        lengths = [config["search"]["max_length"], config["model"]["context_length"]]
        ids = config["model"]["eos_token_id"]
    except (KeyError, TypeError) as error:
        raise InputError(f"lacks {error}", where=where, fix=_AGAIN) from error
    ids = ids if isinstance(ids, list) else [ids]
    if not ids or not all(isinstance(value, int) and value >= 0 for value in [*ids, *lengths]):
        raise InputError("max_length, context_length and eos_token_id must be whole numbers", where=where, fix=_AGAIN)
    for key, name in _paths(config):
        _check_name(name, where)
        if name not in outputs:
            raise InputError(f"{key} is {name!r}, a file that the manifest does not list", where=where, fix=_AGAIN)


def _paths(value: Any) -> Iterator[tuple[str, str]]:
    """Keys of genai_config.json that name files (`filename`, `custom_ops_library`, …), with their values."""
    if isinstance(value, list):
        for item in value:
            yield from _paths(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if isinstance(item, str) and item and key.lower().endswith(("filename", "library", "path")):
                yield key, item
            yield from _paths(item)


def _check_golden_form(folder: Path, golden: Any) -> None:
    where = folder / "golden.json"
    if not isinstance(golden, dict) or golden.get("format") != GOLDEN_FORMAT:
        raise InputError(f"is not of the format {GOLDEN_FORMAT!r}", where=where, fix="export it with this edgetune")
    prompts, stop_ids = golden.get("prompts"), golden.get("stop_ids")
    if (
        not isinstance(prompts, list)
        or not prompts
        or not isinstance(stop_ids, list)
        or not all(isinstance(prompt, dict) and {"messages", "text", "ids"} <= prompt.keys() for prompt in prompts)
    ):
        raise InputError("has no golden prompts", where=where, fix=_AGAIN)
