"""One file that carries an artifact: `package` writes it, `check` proves it, `unpack` gives the artifact back."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from edgetune import progress
from edgetune.deploy import oci, zipped
from edgetune.deploy.members import (
    MANIFEST,
    MOST_BYTES,
    SBOM,
    Member,
    Source,
    blocks,
    broken,
    check_content,
    check_names,
    source,
)
from edgetune.deploy.sbom import sbom
from edgetune.errors import InputError
from edgetune.files import require_space, sha256_file, staged_file, staged_folder
from edgetune.leases import lease
from edgetune.run import FORMAT, read_manifest

Kind = Literal["zip", "oci"]
_SUFFIX: dict[Kind, str] = {"zip": ".zip", "oci": ".oci.tar"}
_HEADERS = 2000  # bytes a file that a zip or a tar needs beside its content, generously
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


@dataclass(frozen=True)
class Bundle:
    """A file that carries an artifact, its structure checked.

    Attributes:
        path: the file.
        kind: how it is made.
        members: the artifact's files, and the bill of materials.
        manifest: the artifact's manifest.json.
    """

    path: Path
    kind: Kind
    members: list[Member]
    manifest: dict[str, Any]

    def describe(self) -> dict[str, Any]:
        """What it is: `kind`, `name`, `base`, `license`, `target`, `edgetune`, `created`, `files`, `bytes`."""
        base = self.manifest.get("chain", {}).get("base", {})
        target = self.manifest.get("options", {}).get("target", {})
        return {
            "kind": self.kind,
            "name": self.manifest.get("name"),
            "base": base.get("upstream") or base.get("id"),
            "license": base.get("license"),
            "target": {key: target[key] for key in ("provider", "precision") if key in target},
            "edgetune": self.manifest.get("edgetune"),
            "created": self.manifest.get("created"),
            "files": len(self.members),
            "bytes": sum(member.bytes for member in self.members),
        }


def package(artifact: Path, kind: Kind, out: Path | None = None) -> dict[str, Any]:
    """Write an artifact as one file: the same bytes each time, wherever its folder lies.

    Args:
        artifact: artifact or run folder; every file is checked against its manifest first.
        kind: a zip, or an OCI image layout in a tar.
        out: the file; NAME.zip or NAME.oci.tar in the working folder when not given. Only an earlier package is replaced.

    Returns:
        `path`, `kind`, `name`, `files`, `bytes` of the file, its `sha256`, and for OCI the `digest` of its manifest.

    Raises:
        InputError: it is no whole artifact, or the file cannot lie there.
    """
    from edgetune.runtime.artifact import open_any

    with lease(artifact, "edgetune package"):
        opened = open_any(artifact)
        check_names(opened.path / MANIFEST, [*opened.manifest["outputs"], MANIFEST, SBOM])
        root = re.sub(r"[^A-Za-z0-9._-]+", "-", opened.name).strip(".-") or "artifact"
        final = out or Path(root + _SUFFIX[kind])
        _check_out(final, opened.path)
        files = _sources(opened.path, opened.manifest)
        total = sum(file.bytes for file in files)
        require_space(final, total + _HEADERS * (len(files) + 10), "the package")
        digest = None
        with staged_file(final) as staged:
            with staged.open("wb") as file, progress.task("package", total) as bar:
                if kind == "zip":
                    zipped.write(file, root, files, bar)
                else:
                    digest = oci.write(file, files, opened.manifest, bar)
                file.flush()
                os.fsync(file.fileno())
            found = {"bytes": staged.stat().st_size, "sha256": sha256_file(staged)}
    result = {"path": str(final), "kind": kind, "name": opened.name, "files": len(files), **found}
    return result | ({"digest": digest} if digest else {})


def _sources(folder: Path, manifest: dict[str, Any]) -> list[Source]:
    """What is packed, what describes it first: who reads on from the beginning knows early what it is."""
    text = (folder / MANIFEST).read_bytes()
    bill = json.dumps(sbom(manifest, hashlib.sha256(text).hexdigest()), indent=2, ensure_ascii=False) + "\n"
    listed = [
        Source(name, folder / name, entry["bytes"], entry["sha256"])
        for name, entry in sorted(manifest["outputs"].items())
        if name != SBOM
    ]
    return [source(MANIFEST, text), source(SBOM, bill.encode()), *listed]


def _check_out(out: Path, artifact: Path) -> None:
    if out.absolute().resolve().is_relative_to(artifact):
        raise InputError("lies in the artifact that is packed", where=out, fix="choose another place: --out FILE")
    if out.is_symlink() or (out.exists() and not out.is_file()):
        raise InputError("is not a file that can be replaced", where=out, fix="choose another name: --out FILE")
    if out.exists():
        try:
            open_bundle(out)
        except InputError as error:
            fix = "remove it, or choose another name: --out FILE"
            raise InputError("exists, and is no package of edgetune's", where=out, fix=fix) from error


def open_bundle(path: Path) -> Bundle:
    """Look at a file that carries an artifact: what kind it is by its content, and whether its lists agree.

    Raises:
        InputError: it is something else, cut short, or made to do harm.
    """
    kind = _kind(path)
    members = zipped.read(path) if kind == "zip" else oci.read(path)
    check_names(path, (member.name for member in members))
    named = {member.name: member for member in members}
    for name in (MANIFEST, SBOM):
        if name not in named:
            raise broken(path, f"lacks {name}")
    with path.open("rb") as file:
        manifest = _load_manifest(path, file, named[MANIFEST])
    outputs = manifest["outputs"]
    if missing := sorted(outputs.keys() - named.keys()):
        raise broken(path, f"lacks {missing[0]}, which {MANIFEST} lists")
    if extra := sorted(named.keys() - outputs.keys() - {MANIFEST, SBOM}):
        raise broken(path, f"holds {extra[0]!r}, which {MANIFEST} does not list")
    for name, entry in outputs.items():
        if (entry.get("bytes"), entry.get("sha256")) != (named[name].bytes, named[name].sha256):
            raise broken(path, f"{name} is not the file that {MANIFEST} lists")
    return Bundle(path, kind, members, manifest)


def _kind(path: Path) -> Kind:
    if path.is_dir():
        raise InputError(
            "is a folder; a package is one file", where=path, fix="an artifact's folder can be used as it is"
        )
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except FileNotFoundError as error:
        raise InputError("no such file", where=path) from error
    if head.startswith(zipped.MAGIC):
        return "zip"
    if oci.is_tar(head):
        return "oci"
    if head.startswith((_GZIP, _ZSTD)):
        raise InputError("was compressed afterwards", where=path, fix="decompress it first (gunzip, unzstd)")
    what = "is empty" if not head else "is neither a zip nor a tar"
    raise InputError(f"{what}, so no packed artifact", where=path, fix="give what `edgetune package` wrote")


def _load_manifest(path: Path, file: BinaryIO, member: Member) -> dict[str, Any]:
    if member.bytes > MOST_BYTES:
        raise broken(path, f"claims a {MANIFEST} of {member.bytes:,} bytes")
    check_content(path, file, member)
    try:
        found = json.loads(b"".join(blocks(file, member)))
    except ValueError as error:
        raise broken(path, f"its {MANIFEST} is not JSON") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise InputError(
            f"its {MANIFEST} is not of the format {FORMAT!r}", where=path, fix="use the edgetune that wrote it"
        )
    outputs = found.get("outputs")
    if not isinstance(outputs, dict) or not all(isinstance(entry, dict) for entry in outputs.values()):
        raise broken(path, f"its {MANIFEST} lists no files")
    return found


def check(path: Path) -> Bundle:
    """Prove that a package is whole: every byte of every file against its hash. Raises InputError."""
    found = open_bundle(path)
    total = sum(member.bytes for member in found.members)
    with path.open("rb") as file, progress.task("checking the package", total) as bar:
        for member in found.members:
            check_content(path, file, member, bar)
    return found


def unpack(path: Path, out: Path) -> dict[str, Any]:
    """Check a package, then write the artifact that it carries.

    Args:
        path: what `package` wrote.
        out: folder of the artifact, replaced as a whole; an earlier artifact or nothing may stand there.

    Returns:
        What it is (see `Bundle.describe`), with `path`, the artifact's folder.

    Raises:
        InputError: it is damaged or something else; nothing is written then.
    """
    from edgetune.runtime.artifact import open_any

    _check_folder(out)
    found = check(path)
    total = sum(member.bytes for member in found.members)
    require_space(out, total, "the artifact")
    with staged_folder(out) as staged, path.open("rb") as file, progress.task("unpack", total) as bar:
        for member in found.members:
            target = staged / member.name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as made:
                for block in blocks(file, member):
                    made.write(block)
                    bar.advance(len(block))
        open_any(staged)  # what was written is what was checked, and is an artifact
    return {"path": str(out), **found.describe()}


def _check_folder(out: Path) -> None:
    """Refuse to replace anything but an artifact that stands alone."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError("is a link or a file", where=out, fix="choose a folder: --out FOLDER")
    if (out.absolute().parent / "recipe.json").is_file():
        raise InputError("lies in a run, whose stages own its folders", where=out, fix="choose another: --out FOLDER")
    if out.is_dir() and any(out.iterdir()) and read_manifest(out).get("stage") != "export":
        raise InputError(
            "holds files that are no artifact", where=out, fix="choose an empty or a new folder: --out FOLDER"
        )
