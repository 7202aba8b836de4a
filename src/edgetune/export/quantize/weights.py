"""A merged model's tensors, read one by one from its safetensors, and its modules without their weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.errors import InputError
from edgetune.models import explained, load_config
from edgetune.models.quiet import quiet

if TYPE_CHECKING:
    import torch


class Weights:
    """The tensors of a transformers folder; only what is asked for is read.

    A file is mapped for one tensor at a time: pages that were read stay resident as long as their file is mapped, so that in the
    end a process would hold the whole model.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Path] = {}

    def __enter__(self) -> Weights:
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        else:
            names = ["model.safetensors"]
        for name in names:
            if not (self.folder / name).is_file():
                raise InputError(
                    "the model's weights are missing", where=self.folder / name, fix="copy or merge it again, whole"
                )
            with _opened(self.folder / name) as file:
                self._files.update(dict.fromkeys(file.keys(), self.folder / name))
        return self

    def __exit__(self, *error: object) -> None:
        self._files = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def shape(self, name: str) -> list[int]:
        """One tensor's shape; the tensor is not read."""
        with _opened(self._files[name]) as file:
            return list(file.get_slice(name).get_shape())

    def get(self, name: str) -> torch.Tensor:
        """One tensor, float32. Raises InputError when the model lacks it or it holds NaN or infinity."""
        if name not in self._files:
            raise InputError(f"the model has no weight {name}", where=self.folder, fix="copy or merge it again, whole")
        with _opened(self._files[name]) as file:
            found = file.get_tensor(name).float()
        if not found.isfinite().all():
            raise InputError(
                f"{name} holds numbers that are not finite",
                where=self.folder,
                fix="copy the model again; if it was trained: train again with a lower train.learning_rate",
            )
        tensor: torch.Tensor = found
        return tensor

    def fill(self, module: torch.nn.Module, prefix: str) -> None:
        """Read each parameter and each stored buffer of a module."""
        import torch

        for name in module.state_dict():
            owner, _, last = name.rpartition(".")
            place = module.get_submodule(owner)
            tensor = self.get(f"{prefix}.{name}")
            if isinstance(getattr(place, last), torch.nn.Parameter):
                setattr(place, last, torch.nn.Parameter(tensor, requires_grad=False))
            else:
                setattr(place, last, tensor)


def _opened(file: Path) -> Any:
    from safetensors import safe_open

    return safe_open(str(file), "pt")


def empty(module: torch.nn.Module) -> None:
    """Give a module's memory back."""
    module.to("meta")


def skeleton(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The model of a folder, for inference in float32, with no weights: each parameter lies on torch's `meta` device.

    What is computed, not stored (the frequencies of rotary embeddings), is there.

    Raises:
        InputError: transformers does not know the architecture, or config.json contradicts itself.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(folder, trust_remote_code=trust_remote_code)
    with quiet(), explained(folder, "transformers cannot build this model"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    stored = model.state_dict()
    for path, module in model.named_modules():
        computed = [name for name, _ in module.named_buffers(recurse=False) if f"{path}.{name}" not in stored]
        if computed:
            for name in computed:
                setattr(module, name, torch.empty_like(getattr(module, name), device="cpu"))
            model._init_weights(module)  # how transformers itself fills them after loading
    return model.eval()
