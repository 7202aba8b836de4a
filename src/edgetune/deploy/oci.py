"""An artifact as an OCI image layout in a tar, described as CNCF ModelPack wants it.

Each file is a layer of its own, uncompressed: its digest is the SHA-256 that the artifact's manifest has, registries keep
what did not change between two versions once, and `oras` gives files back by their titles.
https://github.com/opencontainers/image-spec/blob/main/image-layout.md,
https://github.com/modelpack/model-spec/blob/main/docs/spec.md
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from edgetune.deploy.members import (
    MANIFEST,
    MOST_BYTES,
    MOST_MEMBERS,
    SBOM,
    Member,
    Source,
    bounded,
    broken,
    check_content,
    is_sha256,
    source,
)
from edgetune.progress import Task

_BLOBS = "blobs/sha256"
_INDEX, _LAYOUT = "index.json", "oci-layout"
_INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
_MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
_ARTIFACT_TYPE = "application/vnd.cncf.model.manifest.v1+json"
_CONFIG_TYPE = "application/vnd.cncf.model.config.v1+json"
_LAYER_TYPE = "application/vnd.cncf.model.{}.v1.raw"
_TITLE, _PATH = "org.opencontainers.image.title", "org.cncf.model.filepath"
_TAG = "latest"
_PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # ModelPack's words; others stay as they are
_USTAR_AT = 257
USTAR = b"ustar"


def is_tar(head: bytes) -> bool:
    """Whether a file that begins like this is a tar."""
    return head[_USTAR_AT : _USTAR_AT + len(USTAR)] == USTAR


def write(out: BinaryIO, files: Sequence[Source], manifest: dict[str, Any], bar: Task) -> str:
    """Write the layout. Returns the digest of the image manifest, by which a registry knows it.

    Args:
        out: where to.
        files: the artifact's files, in the order of their layers.
        manifest: the artifact's manifest.json.
        bar: told of each byte.
    """
    config = _json("config", _config(files, manifest))
    image = _json(
        "image",
        {
            "schemaVersion": 2,
            "mediaType": _MANIFEST_TYPE,
            "artifactType": _ARTIFACT_TYPE,
            "config": _descriptor(_CONFIG_TYPE, config),
            "layers": [_layer(file) for file in files],
            "annotations": _annotations(manifest),
        },
    )
    entry = _descriptor(_MANIFEST_TYPE, image) | {
        "artifactType": _ARTIFACT_TYPE,
        "annotations": {"org.opencontainers.image.ref.name": _TAG},
    }
    index = _json(_INDEX, {"schemaVersion": 2, "mediaType": _INDEX_TYPE, "manifests": [entry]})
    layout = source(_LAYOUT, b'{"imageLayoutVersion":"1.0.0"}')
    blobs = {file.sha256: file for file in (image, config, *files)}  # equal files are one blob
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, file in ((_LAYOUT, layout), (_INDEX, index)):
            _add(tar, name, file, bar)
        for folder in ("blobs", _BLOBS):
            tar.addfile(_entry(folder, 0, folder=True))
        for digest, file in blobs.items():
            _add(tar, f"{_BLOBS}/{digest}", file, bar)
    return f"sha256:{image.sha256}"


def _entry(name: str, size: int, folder: bool = False) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)  # its owner is 0 and its time 1970 from the start
    entry.size, entry.mode = size, 0o755 if folder else 0o644
    entry.type = tarfile.DIRTYPE if folder else tarfile.REGTYPE
    return entry


def _add(tar: tarfile.TarFile, name: str, file: Source, bar: Task) -> None:
    tar.addfile(_entry(name, file.bytes), _Blocks(file, bar))  # type: ignore[arg-type]  # all that is asked for is read()


class _Blocks:
    """A source as something that tarfile reads from."""

    def __init__(self, file: Source, bar: Task) -> None:
        self._blocks, self._held, self._bar = file.blocks(), b"", bar

    def read(self, size: int) -> bytes:
        while len(self._held) < size and (block := next(self._blocks, b"")):
            self._held += block
        found, self._held = self._held[:size], self._held[size:]
        self._bar.advance(len(found))
        return found


def _json(name: str, value: dict[str, Any]) -> Source:
    return source(name, json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode())


def _descriptor(kind: str, file: Source) -> dict[str, Any]:
    return {"mediaType": kind, "digest": f"sha256:{file.sha256}", "size": file.bytes}


def _layer(file: Source) -> dict[str, Any]:
    name = PurePosixPath(file.name)
    if name.suffix in (".onnx", ".data", ".onnx_adapter", ".onnx_data", ".bin"):
        kind = "weight"
    elif file.name in (MANIFEST, SBOM) or name.suffix in (".md", ".txt") or name.stem.upper() in ("LICENSE", "NOTICE"):
        kind = "doc"
    else:
        kind = "weight.config"
    return _descriptor(_LAYER_TYPE.format(kind), file) | {"annotations": {_TITLE: file.name, _PATH: file.name}}


def _config(files: Sequence[Source], manifest: dict[str, Any]) -> dict[str, Any]:
    """ModelPack's configuration: https://github.com/modelpack/model-spec/blob/main/docs/config.md"""
    base = manifest.get("chain", {}).get("base", {})
    precision = manifest.get("options", {}).get("target", {}).get("precision")
    about = {"createdAt": manifest.get("created"), "name": manifest.get("name"), "title": manifest.get("name")}
    technical = {"architecture": "transformer", "format": "onnx"}
    made = "embedding" if manifest.get("task") == "feature-extraction" else "text"
    if precision:
        technical["precision"] = _PRECISIONS.get(precision, precision)
    return {
        "descriptor": {key: value for key, value in about.items() if value}
        | ({"licenses": [base["license"]]} if base.get("license") else {}),
        "config": technical | {"capabilities": {"inputTypes": ["text"], "outputTypes": [made]}},
        "modelfs": {"type": "layers", "diffIds": [f"sha256:{file.sha256}" for file in files]},
    }


def _annotations(manifest: dict[str, Any]) -> dict[str, str]:
    found = {
        _TITLE: manifest.get("name"),
        "org.opencontainers.image.created": manifest.get("created"),
        "org.opencontainers.image.licenses": manifest.get("chain", {}).get("base", {}).get("license"),
    }
    return {key: str(value) for key, value in found.items() if value}


def read(path: Path) -> list[Member]:
    """The members that a layout's manifest lists; of contents, only the descriptions are read, and checked.

    Raises:
        InputError: it is no layout as `write` makes it.
    """
    with bounded(path) as file:
        entries = _entries(path, file)
        found = {name: Member(name, entry.offset_data, entry.size, "") for name, entry in entries.items()}

        def load(member: Member) -> Any:
            if member.bytes > MOST_BYTES:
                raise broken(path, f"claims a description of {member.bytes:,} bytes")
            file.seek(member.offset)
            try:
                return json.loads(file.read(member.bytes))
            except ValueError as error:
                raise broken(path, f"{member.name} is not JSON") from error

        def blob(descriptor: dict[str, Any]) -> Member:
            algorithm, _, digest = str(descriptor["digest"]).partition(":")
            member = found.get(f"{_BLOBS}/{digest}")
            if algorithm != "sha256" or not is_sha256(digest):
                raise broken(path, f"has a digest that is no SHA-256: {descriptor['digest']!r}")
            if member is None:
                raise broken(path, f"lacks the blob {digest[:12]}…, which it lists; it may be cut short")
            if member.bytes != descriptor["size"]:
                raise broken(path, f"the blob {digest[:12]}… has {member.bytes:,} bytes, not {descriptor['size']:,}")
            return Member(member.name, member.offset, member.bytes, digest)

        if _INDEX not in found or _LAYOUT not in found:
            raise broken(
                path, f"is a tar, but no OCI image layout: it has no {_INDEX if _LAYOUT in found else _LAYOUT}"
            )
        try:
            (listed,) = load(found[_INDEX])["manifests"]
            image = blob(listed)
            check_content(path, file, image)
            about = load(image)
            if about.get("artifactType") != _ARTIFACT_TYPE:
                raise broken(path, f"is an OCI image of the type {about.get('artifactType')!r}, not a packed artifact")
            config = blob(about["config"])
            check_content(path, file, config)
            layers = [(layer["annotations"][_TITLE], blob(layer)) for layer in about["layers"]]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise broken(path, f"its {_INDEX} or its manifest is not as edgetune package writes it") from error
    listed_blobs = {image.name, config.name, *(member.name for _, member in layers)}
    if extra := sorted(found.keys() - listed_blobs - {_INDEX, _LAYOUT}):
        raise broken(path, f"holds {extra[0]!r}, which its manifest does not list")
    return [Member(str(name), member.offset, member.bytes, member.sha256) for name, member in layers]


def _entries(path: Path, file: BinaryIO) -> dict[str, tarfile.TarInfo]:
    """The regular files of a tar by name. Raises InputError for anything else in it but the two folders."""
    size = path.stat().st_size
    found: dict[str, tarfile.TarInfo] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while entry := tar.next():
                tar.members = []  # type: ignore[attr-defined]  # they are kept here; the list would grow without end
                if entry.isdir() and entry.name in ("blobs", _BLOBS):
                    continue
                if entry.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or entry.sparse is not None:
                    raise broken(path, f"{entry.name} is not a regular file")
                if entry.name in found or len(found) >= MOST_MEMBERS:
                    raise broken(path, f"holds {entry.name!r} twice, or too many files")
                if entry.offset_data + entry.size > size:
                    raise broken(path, "is cut short")
                found[entry.name] = entry
    except (tarfile.TarError, ValueError, EOFError, OverflowError) as error:
        raise broken(path, f"is a damaged tar, or one cut short ({error})") from error
    return found
