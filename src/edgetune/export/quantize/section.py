"""A target's `quantization`: how its weights are rounded, as its YAML file says it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from edgetune.errors import InputError
from edgetune.export.quantize.grid import Grid
from edgetune.export.quantize.plan import Method, Plan
from edgetune.recipe import AutoSection
from edgetune.recipe_section import Section, changed


class GridSection(Section):
    """How a matrix is stored and computed with."""

    bits: Literal[4, 8] = Field(4, description="Bits of a weight.")
    block_size: Literal[16, 32, 64, 128, 256] = Field(32, description="Weights that share a scale.")
    zero_points: bool = Field(False, description="A zero point for each block.")
    activations: Literal["float", "int8"] = Field(
        "float",
        description="`int8` rounds the inputs to 8 bits at run time, too (DynamicQuantizeMatMul): 8-bit weights with a scale "
        "for each row. Prompts are read about three times faster than with `float` (MatMulNBits).",
    )

    @model_validator(mode="after")
    def _is_a_grid(self) -> GridSection:
        try:
            self.grid()
        except InputError as error:
            raise ValueError(f"{error.what}: {error.fix}") from error
        return self

    def grid(self) -> Grid:
        """The same as the code knows it."""
        return Grid(self.bits, self.block_size, self.zero_points, self.activations)


class QuantizationSection(GridSection):
    """The default for all matrices, what differs, and how the codes are chosen."""

    method: Method | Literal["auto"] = Field(
        "gptq",
        description="Of 4-bit weights: `gptq` calibrates on training rows; `least_error` and `min_max` round each weight. "
        "`auto` measures what each layer bears and what each kernel costs here, and chooses all grids by `auto`'s limits.",
    )
    auto: AutoSection = Field(default_factory=AutoSection, description="Limits of `method: auto`.")
    modules: dict[str, GridSection] = Field(
        default_factory=dict,
        description="Other grids, by the last part of a module's name (`down_proj`) or its full name "
        "(`model.layers.3.mlp.down_proj`). `lm_head` is the head, and a tied embedding.",
    )
    unsigned: bool = Field(
        False,
        description="Store weights that are computed with int8 activations as uint8, for x86 processors without VNNI, where int8 "
        "has to be converted at each start and is slower. With VNNI, int8 is faster.",
    )
    calibration_tokens: int = Field(8192, ge=1000, description="Tokens of training rows to calibrate on.")

    @model_validator(mode="after")
    def _auto_chooses_all_grids(self) -> QuantizationSection:
        chosen = [
            name for name in ("bits", "block_size", "zero_points", "activations", "modules") if name in self.told()
        ]
        if self.method == "auto" and chosen:
            raise ValueError(f"`method: auto` chooses the grids itself: remove {', '.join(chosen)}")
        if self.method != "auto" and "auto" in self.told():
            raise ValueError("limits under `auto` go with `method: auto`")
        return self

    def told(self) -> list[str]:
        """Which options have another value than their default."""
        return changed(self, *type(self).model_fields)

    def plan(self) -> Plan:
        """The same as the code knows it; with `method: auto`, what `auto.find` replaces once it has measured."""
        if self.method == "auto":
            return Plan(self.grid())
        return Plan(self.grid(), {name: one.grid() for name, one in self.modules.items()}, self.method)
