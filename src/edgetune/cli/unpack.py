"""`edgetune unpack`: the artifact out of one file, checked first."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edgetune.cli._common import Json, megabytes, print_json, print_table
from edgetune.errors import InputError


def command(
    file: Annotated[Path, typer.Argument(help="What edgetune package wrote, a zip or an OCI tar.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder of the artifact; nothing or an earlier one may stand there."),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only check it and say what it is.")] = False,
    json: Json = False,
) -> None:
    """Check every byte of a packed artifact, then write its folder: whole, or not at all.

    \b
    Examples:
      edgetune unpack quickstart.zip --out quickstart
      edgetune unpack quickstart.oci.tar --check
    """
    from edgetune.deploy import bundle

    if check == (out is not None):
        raise InputError(
            "needs a place for the artifact", where="edgetune unpack", fix="--out FOLDER, or --check alone"
        )
    found = bundle.unpack(file, out) if out else {"path": str(file), **bundle.check(file).describe()}
    if json:
        print_json(found)
    else:
        print_table(("artifact", "value"), _rows(found, unpacked=out is not None))


def _rows(found: dict[str, Any], unpacked: bool) -> list[tuple[str, str]]:
    target = found["target"]
    rows = [
        ("name", found["name"]),
        ("base model", found["base"]),
        ("licence", found["license"]),
        ("made for", " ".join(target.values())),
        ("made by", f"edgetune {found['edgetune']}" if found["edgetune"] else None),
        ("on", found["created"]),
        ("was packed as", {"zip": "zip", "oci": "OCI image layout"}[found["kind"]]),
        ("files", f"{found['files']}, {megabytes(found['bytes'])}, each with the hash that was listed"),
        ("lies in" if unpacked else "is", found["path"] if unpacked else "whole"),
        ("next", f"edgetune chat {found['path']}" if unpacked else None),
    ]
    return [(what, str(value)) for what, value in rows if value]
