"""From a merged model to a whole artifact: graph, contract, card, manifest, and a first load as the device does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgetune.errors import EdgetuneError
from edgetune.export.card import card
from edgetune.export.decoder import export_decoder
from edgetune.export.targets import Target
from edgetune.files import folder_size, write_json, write_text
from edgetune.run import Work, seal


def export(
    merged: Path,
    target: Target,
    max_length: int,
    *,
    name: str,
    chain: dict[str, Any],
    work: Work,
    trust_remote_code: bool,
    artifact: Path,
    report: Path,
) -> dict[str, Any]:
    """Write a whole artifact and load it once.

    Args:
        merged: transformers folder.
        target: the device profile.
        max_length: context in tokens, capped at the model's own.
        name: the artifact's name.
        chain: `base` (id, revision, license, sha256) and the digests of data and adapter, for manifest and card.
        work: what is done, for the manifest.
        trust_remote_code: run code that the model's folder brings.
        artifact: existing, empty folder.
        report: existing folder for report.json and builder.log.

    Returns:
        The report.

    Raises:
        InputError: the model cannot be exported.
        EdgetuneError: the builder failed, or its artifact does not load or does not keep the chat contract.
    """
    found = export_decoder(
        merged, target, max_length, artifact=artifact, report=report, name=name, trust_remote_code=trust_remote_code
    )
    write_text(artifact / "README.md", card(name, chain["base"], target, {"export": found}))
    seal(artifact, work, name=name, task="text-generation", chain=chain)
    _load(artifact)
    found["size_mb"] = round(folder_size(artifact) / 1e6, 3)
    write_json(report / "report.json", found)
    return found


def _load(artifact: Path) -> None:
    """Load the artifact as the device does, golden prompts included, and let it answer."""
    from edgetune.runtime.artifact import open_artifact
    from edgetune.runtime.options import GenerationOptions
    from edgetune.runtime.session import Session

    with Session(open_artifact(artifact)) as session:
        answer = session.generate("Hello", GenerationOptions(max_tokens=4))
    if answer.completion_tokens < 1:
        raise EdgetuneError("the artifact loads, but generates nothing", where=artifact.name)
