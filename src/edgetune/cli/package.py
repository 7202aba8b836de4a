"""`edgetune package`: an artifact as one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edgetune.cli._common import Json, megabytes, print_json, print_table
from edgetune.errors import InputError


def command(
    artifact: Annotated[Path, typer.Argument(help="Artifact, or the run that holds it.", show_default=False)],
    zip: Annotated[bool, typer.Option("--zip", help="Write a zip, which any tool opens.")] = False,
    oci: Annotated[bool, typer.Option("--oci", help="Write an OCI image layout in a tar, for registries.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The file; NAME.zip or NAME.oci.tar here when not given."),
    ] = None,
    json: Json = False,
) -> None:
    """Put an artifact into one file: the same bytes each time, with a bill of materials and the hash of each file.

    \b
    Examples:
      edgetune package runs/quickstart/artifact --zip
      edgetune package runs/quickstart --oci --out quickstart.oci.tar
    """
    from edgetune.deploy.bundle import package

    if zip == oci:
        raise InputError("choose one of two kinds", where="edgetune package", fix="--zip, or --oci for a registry")
    found = package(artifact, "zip" if zip else "oci", out)
    if json:
        print_json(found)
        return
    print_table(("package", "value"), [("file", found["path"]), *_rows(found), ("next", _next(found))])


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("carries", f"{found['name']}, {found['files']} files"),
        ("size", megabytes(found["bytes"])),
        ("SHA-256", found["sha256"]),
    ]
    return rows + ([("manifest", found["digest"])] if "digest" in found else [])


def _next(found: dict[str, Any]) -> str:
    return f"edgetune unpack {found['path']} --out FOLDER"
