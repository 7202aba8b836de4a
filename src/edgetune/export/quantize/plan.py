"""Which grid each matrix of a model gets, and how its codes are chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from edgetune.export.quantize.grid import BLOCK_SIZES, Grid

if TYPE_CHECKING:
    import torch

Method = Literal["min_max", "least_error", "gptq"]

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"


@dataclass(frozen=True)
class Plan:
    """Attributes:
    default: the grid of every matrix that nothing else is said of.
    modules: other grids, by a module's full name (`model.layers.3.mlp.down_proj`) or its last part (`down_proj`). A
        fused matrix goes by its parts: `q_proj`, `k_proj`, `v_proj`, `gate_proj`, `up_proj`. A tied embedding is the
        head.
    method: of 4-bit codes; those of 8 bits are the nearest ones. `gptq` calibrates on rows, the others need none.
    methods: other methods, by a module's full name.
    most_error: of a matrix's outputs (relative, squared) that int8 activations may bring; above it, it gets `spare`.
    """

    default: Grid
    modules: Mapping[str, Grid] = field(default_factory=dict)
    method: Method = "gptq"
    most_error: float = 0.005
    methods: Mapping[str, Method] = field(default_factory=dict)

    @property
    def searched(self) -> bool:
        """Whether a matrix gets its codes by GPTQ; then every matrix makes up for what those before it lost."""
        return "gptq" in (self.method, *self.methods.values())

    @property
    def calibrated(self) -> bool:
        """Whether rows are needed."""
        return self.searched or any(grid.activations == "int8" for grid in (self.default, *self.modules.values()))

    @staticmethod
    def spare(columns: int) -> Grid:
        """What a matrix gets whose inputs do not bear int8 activations: 8 bits in the largest blocks that divide it."""
        return Grid(8, next((size for size in reversed(BLOCK_SIZES) if columns % size == 0), 32))

    def grid(self, name: str) -> Grid:
        """The grid of a module, by its full name. The embedding and the head never get int8 activations: a lookup has
        none, and a head's few rows gain nothing."""
        found = self.modules.get(name) or self.modules.get(name.rpartition(".")[2]) or self.default
        return Grid(8, 32) if found.activations == "int8" and name in (EMBEDDING, HEAD) else found

    def method_of(self, name: str) -> Method:
        """The method of a module, by its full name."""
        return self.methods.get(name, self.method)


_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def part_names(name: str) -> list[str]:
    """The names of the parts of a fused matrix; the name itself for any other."""
    owner, _, last = name.rpartition(".")
    return [f"{owner}.{part}" for part in _FUSED[last]] if last in _FUSED else [name]


def parts_of(name: str, tensor: torch.Tensor, config: Any) -> list[tuple[str, torch.Tensor]]:
    """A fused matrix (rows, columns) or its bias (rows,) as the parts that the graph computes one by one.

    Args:
        name: the module's full name, such as `model.layers.3.self_attn.qkv_proj`.
        config: the transformers configuration, which says how many rows each part has.

    Returns:
        Names and views of the parts; any other matrix as it is.
    """
    config = config.get_text_config()
    last = name.rpartition(".")[2]
    if last == "qkv_proj":
        heads, own = config.num_attention_heads, config.num_key_value_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        rows = [heads * size, own * size, own * size]
    elif last == "gate_up_proj":
        rows = [tensor.shape[0] // 2] * 2
    else:
        return [(name, tensor)]
    return list(zip(part_names(name), tensor.split(rows), strict=True))
