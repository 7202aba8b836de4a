"""Quantized matrices in one file: what training through the rounding hands on to the export."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from edgetune.errors import InputError, first_line
from edgetune.export.quantize.grid import Grid, Quantized, pack, unpack
from edgetune.files import staged_file

if TYPE_CHECKING:
    import torch

FILE = "grids.safetensors"


def save(file: Path, found: Mapping[str, Quantized]) -> None:
    """Write matrices by their full names: `NAME.codes` packed, `NAME.scales` float32, `NAME.zeros` where there are some."""
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    about = {}
    for name, one in found.items():
        tensors[f"{name}.codes"] = pack(one.codes, one.grid.bits).contiguous()
        tensors[f"{name}.scales"] = one.scales.float().contiguous()
        if one.zeros is not None:
            tensors[f"{name}.zeros"] = one.zeros.contiguous()
        about[name] = {**asdict(one.grid), "columns": one.codes.shape[1]}
    with staged_file(file) as part:
        save_file(tensors, str(part), metadata={"grids": json.dumps(about)})


def load(file: Path) -> dict[str, Quantized]:
    """What `save` wrote. Raises InputError: it is not there, or broken."""
    from safetensors import SafetensorError, safe_open

    found = {}
    try:
        with safe_open(str(file), "pt") as tensors:
            stored = set(tensors.keys())
            for name, about in json.loads(tensors.metadata()["grids"]).items():
                columns = about.pop("columns")
                grid = Grid(**about)
                codes = unpack(tensors.get_tensor(f"{name}.codes"), grid.bits, columns)
                zeros = tensors.get_tensor(f"{name}.zeros") if f"{name}.zeros" in stored else None
                found[name] = Quantized(grid, codes, tensors.get_tensor(f"{name}.scales"), zeros)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"the codes that were trained cannot be read: {first_line(error)}",
            where=file,
            fix="train again (`edgetune run RECIPE --from train`), or export with train.quantization_aware=false",
        ) from error
    return found
