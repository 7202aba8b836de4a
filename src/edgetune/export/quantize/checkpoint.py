"""A quantized checkpoint on disk, in the layout that ONNX Runtime GenAI's model builder reads for `olive`.

For a matrix NAME it holds `NAME.qweight` (rows, bytes of a row) uint8, `NAME.scales` (rows, blocks) float32 and, on a
grid with zero points, `NAME.qzeros` (rows, bytes of a row) uint8; config.json says bits and block size, for all and for
each matrix that differs. Everything else of the model (norms, biases) is there in float32. There is a file a layer, so
that no more than a layer is in memory while it is written.

Matrices with int8 activations lie there as 8-bit matrices whose blocks all have the row's scale, which the builder can
read and compute the same weights with; `graph.finish` gives them their own kernel.

The builder keeps the embedding as floats. So it gets a stub of one row, and `graph.finish` puts the quantized
one in its place, from the head if tied, else from `embedding.quantized` beside the checkpoint.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from edgetune.export.quantize.grid import Grid, Quantized
from edgetune.export.quantize.plan import EMBEDDING, HEAD, Plan, part_names, parts_of
from edgetune.export.quantize.weights import Weights, skeleton
from edgetune.files import write_json
from edgetune.models import load_config

if TYPE_CHECKING:
    import torch

EMBEDDING_FILE = "embedding.quantized"  # safetensors, under a name that the builder does not look at
_COPIED = (".json", ".jinja", ".model", ".txt", ".py")
_NOT_COPIED = ("manifest.json", "model.safetensors.index.json")


class Checkpoint:
    """Writes a quantized checkpoint as `quantize_model` hands out its matrices: `keep`, `layer_done`, at last `finish`.

    Args:
        folder: existing, empty folder.
        merged: the transformers folder that is quantized.
        plan: what its matrices are quantized to; its default grid becomes the checkpoint's.
    """

    def __init__(self, folder: Path, merged: Path, plan: Plan) -> None:
        self.folder, self._merged, self._plan = folder, merged, plan
        self._waiting: dict[str, torch.Tensor] = {}
        self._grids: dict[str, Grid] = {}
        self._columns: dict[str, int] = {}
        self._written: set[str] = set()
        self._floats: dict[str, torch.Tensor] = {}
        self._files = 0
        self.weight_bytes = 0  # of all matrices in the graph: codes, scales and zero points

    def keep(self, name: str, found: Quantized) -> None:
        """Take one matrix."""
        self._grids[name], self._columns[name] = found.grid, found.codes.shape[1]
        self.weight_bytes += found.grid.size(*found.codes.shape)
        if name == EMBEDDING:
            self._write_embedding(found)
            return
        if found.grid.activations == "int8":
            columns = found.codes.shape[1]
            stored = Plan.spare(columns)
            found = Quantized(stored, found.codes, found.scales.expand(-1, stored.blocks(columns)))
        self._waiting[f"{name}.qweight"] = found.packed_codes().flatten(1).contiguous()
        self._waiting[f"{name}.scales"] = found.scales.contiguous()
        zeros = found.packed_zeros()
        if zeros is not None:
            self._waiting[f"{name}.qzeros"] = zeros.contiguous()

    def keep_float(self, name: str, tensor: torch.Tensor) -> None:
        """Take a weight that is not quantized and is no longer the merged model's."""
        self._floats[name] = tensor

    def layer_done(self) -> None:
        """Write what waits into a file of its own."""
        from safetensors.torch import save_file

        if self._waiting:
            self._written.update(self._waiting)
            save_file(self._waiting, str(self.folder / f"part-{self._files:05d}.safetensors"))
            self._files += 1
            self._waiting = {}

    def finish(self, *, trust_remote_code: bool = False) -> None:
        """Write the rest of the model in float32, its configuration and its tokenizer."""
        import torch

        config = load_config(self._merged, trust_remote_code=trust_remote_code)
        known = skeleton(self._merged, trust_remote_code=trust_remote_code).state_dict()
        with Weights(self._merged) as weights:
            for name in (name for name in weights if name in known):  # what else lies there, the model does not read
                owner, _, last = name.rpartition(".")
                if owner in (EMBEDDING, HEAD) and last == "weight":
                    continue  # the head is quantized; a tied one may lie there under either name
                if all(f"{part}.q{last}" in self._written for part in part_names(owner)):
                    continue  # nothing of it is left to read
                tensor = self._floats[name] if name in self._floats else weights.get(name)
                for part, piece in parts_of(owner, tensor, config):
                    if f"{part}.q{last}" not in self._written:
                        self._waiting[f"{part}.{last}"] = piece.contiguous()
        self._waiting[f"{EMBEDDING}.weight"] = torch.zeros(1, config.get_text_config().hidden_size)
        self.layer_done()
        for path in self._merged.iterdir():
            if path.is_file() and path.suffix in _COPIED and path.name not in _NOT_COPIED:
                shutil.copyfile(path, self.folder / path.name)
        self._write_config()

    @property
    def int8(self) -> list[str]:
        """The matrices that are computed with int8 activations."""
        return [name for name, grid in self._grids.items() if grid.activations == "int8"]

    def grids(self) -> dict[str, int]:
        """How many matrices lie on each grid."""
        return dict(Counter(map(str, self._grids.values())).most_common())

    def _write_embedding(self, found: Quantized) -> None:
        from safetensors.torch import save_file

        zeros = found.packed_zeros()
        save_file(
            {
                "codes": found.gather_codes(),
                "scales": found.scales.contiguous(),
                **({} if zeros is None else {"zeros": zeros.contiguous()}),
            },
            str(self.folder / EMBEDDING_FILE),
            metadata={"bits": str(found.grid.bits), "block_size": str(found.grid.block_size)},
        )

    def _write_config(self) -> None:
        path, default = self.folder / "config.json", self._plan.default
        if default.activations == "int8":
            default = Grid(8, 32)
        config = json.loads(path.read_text(encoding="utf-8"))
        overrides = {}
        for name, kept in self._grids.items():
            grid = Plan.spare(self._columns[name]) if kept.activations == "int8" else kept
            other = {}
            if grid.bits != default.bits:
                other["bits"] = grid.bits
            if grid.block_size != default.block_size:
                other["group_size"] = grid.block_size
            if other:
                overrides[name] = other
        config["quantization_config"] = {
            "quant_method": "olive",
            "bits": default.bits,
            "group_size": default.block_size,
            "symmetric": not default.zero_points,
            "overrides": overrides,
        }
        write_json(path, config)
