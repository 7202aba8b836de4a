"""Reads LoRA adapters that are to stay beside their base, and refuses what cannot stay there.

The folder layout is peft's: adapter_config.json and adapter_model.safetensors
(https://huggingface.co/docs/peft/developer_guides/checkpoint).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.errors import InputError
from edgetune.export.quantize.plan import parts_of
from edgetune.export.targets import Target
from edgetune.files import digest, read_json, sha256_file
from edgetune.models import Base, load_config
from edgetune.progress import say
from edgetune.run import read_manifest
from edgetune.runtime.artifact import check_adapter_name
from edgetune.train.merge import check_adapter, is_whole
from edgetune.train.method import QUANTIZATION

if TYPE_CHECKING:
    import torch

KEY = "export.adapters"
_MERGE = "merge it (`edgetune merge`) and export the merged model"
_WEIGHT = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight")
# Of peft's configuration: what changes more than products beside the base's own.
_REFUSED = {
    "use_dora": "dora scales the base's own weights",
    "modules_to_save": "it has modules that were trained whole",
    "trainable_token_indices": "it changes tokens of the embedding",
    "layer_replication": "it has layers that the base does not have",
    "target_parameters": "it adapts parameters that are no linear layers",
    "alora_invocation_tokens": "it is switched on by tokens",
    "lora_bias": "it has biases",
    "fan_in_fan_out": "its layers keep their weights turned",
}
# peft takes these out of the base's weights when it loads them, so that the base is another one then.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True)
class Adapter:
    """One adapter.

    Attributes:
        name: under which it is switched on.
        folder: where it was read from.
        digest: of its weights and configuration.
        rank: the largest of its layers.
        parts: by the full name of a matrix as the graph computes it (`model.layers.0.self_attn.q_proj`), A (rank, inputs)
            and B (outputs, rank), float32, B multiplied by the adapter's scale. Parts of a fused matrix share their A.
    """

    name: str
    folder: Path
    digest: str
    rank: int
    parts: dict[str, tuple[torch.Tensor, torch.Tensor]]


def require_separable(target: Target) -> None:
    """Raise InputError where a target's graphs cannot have adapters beside them."""
    if target.static:
        raise InputError(
            "a target with fixed shapes has no place for adapters of any rank",
            where=KEY,
            fix="use a target for the CPU, such as cpu-int8, or export.adapters: merged",
        )
    if target.provider != "cpu":
        raise InputError(
            f"adapters that are switched at run time have not been tried on the provider {target.provider}",
            where=KEY,
            fix="use a target for the CPU, such as cpu-int8, or export.adapters: merged",
        )


def read_adapters(given: Sequence[tuple[str, Path]], base: Base, *, trust_remote_code: bool = False) -> list[Adapter]:
    """Read adapters of one base.

    Args:
        given: names and folders.
        base: the base that all of them were trained on.
        trust_remote_code: run code that the base brings.

    Raises:
        InputError: a name that cannot be used or is used twice; what is no LoRA adapter, or more than one; an adapter of
            another base; adapters that were trained with different chat templates, or on different 4-bit weights.
    """
    seen: dict[str, str] = {}
    for name, _ in given:
        check_adapter_name(name, "--adapter")
        if (other := seen.get(name.lower())) is not None:
            same = f"the name {name} is given twice" if other == name else f"{other} and {name} differ in case only"
            raise InputError(same, where="--adapter", fix="name each adapter otherwise: --adapter NAME=FOLDER")
        seen[name.lower()] = name
    config = load_config(base.path, trust_remote_code=trust_remote_code)
    found = [_read(name, folder, base, config) for name, folder in given]
    _require_alike(found)
    return found


def _read(name: str, folder: Path, base: Base, config: Any) -> Adapter:
    if is_whole(folder):
        raise InputError("is a model that was trained whole, not an adapter", where=folder, fix="export it by itself")
    told = check_adapter(folder)
    _refuse(told, folder)
    trained_on = read_manifest(folder).get("inputs", {}).get("base", {}).get("sha256")
    if trained_on and trained_on != base.digest:
        raise InputError(
            f"was trained on {told.get('base_model_name_or_path')}, whose files are not those of {base.id}",
            where=folder,
            fix="adapters of one artifact share one base: give the very base, or train the adapter on it",
        )
    named = told.get("base_model_name_or_path")
    if not trained_on and named and _last(named) not in (_last(base.id), _last(base.upstream or "")):
        say(
            f"export: warning: {name} was trained on {named}, says its adapter_config.json, and stands beside {base.id} here"
        )
    pairs = _pairs(folder, told)
    parts: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for module, (a, b) in pairs.items():
        parts |= {part: (a, piece) for part, piece in parts_of(module, b, config)}
    files = ("adapter_config.json", "adapter_model.safetensors")
    return Adapter(
        name,
        folder,
        digest({file: sha256_file(folder / file) for file in files}),
        max(len(a) for a, _ in pairs.values()),
        parts,
    )


def _last(name: Any) -> str:
    """The last part of a model's folder or id."""
    return str(name).rstrip("/\\").replace("\\", "/").rpartition("/")[2].lower()


def _refuse(told: dict[str, Any], folder: Path) -> None:
    """Raise InputError for what an adapter's configuration says that branches beside the base cannot do."""
    kind = told.get("peft_type", "LORA")
    why = "" if kind == "LORA" else f"it is an adapter of the kind {kind}"
    why = why or next((text for name, text in _REFUSED.items() if told.get(name)), "")
    if not why and told.get("bias", "none") != "none":
        why = "it changes biases of the base"
    if why:
        raise InputError(f"cannot stay beside its base: {why}", where=folder, fix=_MERGE)
    start = str(told.get("init_lora_weights", True)).lower()
    if start.startswith(_CHANGES_BASE):
        raise InputError(
            f"was saved with the initialization {start}, which changes the base, so that it needs a base of its own",
            where=folder,
            fix="have peft convert it (save_pretrained with path_initial_model_for_weight_conversion); edgetune's own are",
        )


def _pairs(folder: Path, told: dict[str, Any]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and scaled B of each layer, by its full name."""
    from safetensors.torch import load_file

    halves: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        match = _WEIGHT.fullmatch(key)
        if match is None or tensor.ndim != 2:
            raise InputError(f"cannot stay beside its base: it holds {key}", where=folder, fix=_MERGE)
        if not tensor.isfinite().all():
            raise InputError(f"{key} holds numbers that are not finite", where=folder, fix="train it again")
        halves.setdefault(match[1], {})[match[2]] = tensor.float()
    found = {}
    for module, half in sorted(halves.items()):
        if half.keys() != {"A", "B"} or len(half["A"]) != half["B"].shape[1]:
            raise InputError(f"{module} has no A and B that fit", where=folder, fix="train or copy the adapter again")
        found[module] = (half["A"], half["B"] * _scale(told, module, folder))
    if not found:
        raise InputError("holds no weights", where=folder, fix="train or copy the adapter again")
    return found


def _scale(told: dict[str, Any], module: str, folder: Path) -> float:
    """What an adapter's product is multiplied by: alpha / rank, or alpha / √rank, of this layer."""

    def of(patterns: Any, default: Any) -> float:
        key = next((key for key in patterns or {} if re.match(rf"(.*\.)?({key})$", module)), None)
        return float(default if key is None else patterns[key])

    try:
        rank, alpha = of(told.get("rank_pattern"), told["r"]), of(told.get("alpha_pattern"), told["lora_alpha"])
        return alpha / (math.sqrt(rank) if told.get("use_rslora") else rank)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, re.error) as error:
        raise InputError(
            "adapter_config.json does not say the rank and alpha", where=folder, fix="train or copy the adapter again"
        ) from error


def _require_alike(adapters: Sequence[Adapter]) -> None:
    """Raise InputError where adapters need different bases, or different chat templates."""
    for what, of, fix in (
        ("chat templates", _template, "train them with one template: model.chat_template"),
        ("4-bit weights", _four_bit, "train all of them with method lora, or with qlora on the same weights"),
    ):
        first = of(adapters[0].folder)
        for other in adapters[1:]:
            if of(other.folder) != first:
                raise InputError(
                    f"{adapters[0].name} and {other.name} were trained with different {what}, and share one base here",
                    where=other.folder,
                    fix=f"{fix}; or export them one by one",
                )


def _template(folder: Path) -> str | None:
    file = folder / "chat_template.jinja"
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _four_bit(folder: Path) -> Any:
    """Which 4-bit weights an adapter was trained against; None for an adapter of the base as it is."""
    return read_json(folder / QUANTIZATION) if (folder / QUANTIZATION).is_file() else None
