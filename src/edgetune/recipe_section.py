"""What every part of the recipe shares: fixed once read, and strict about what is written in it."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """A part of the recipe: fixed once read, unknown keys, infinity and NaN refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _a_number_is_no_truth_value(cls, value: Any, info: ValidationInfo) -> Any:
        """Python counts true as 1, and YAML reads `yes` and `on` as true."""
        kind = cls.model_fields[info.field_name or ""].annotation
        kinds = get_args(kind) or (kind,)
        if isinstance(value, bool) and bool not in kinds and (int in kinds or float in kinds):
            raise ValueError(f"must be a number, not {str(value).lower()}")
        return value


def refused(key: str, what: str, fix: str) -> PydanticCustomError:
    """The error of a combination that makes no sense; `recipe_file` tells of it at the place of `key` (dotted)."""
    return PydanticCustomError("refused", "{what}", {"key": key, "what": what, "fix": fix})


def changed(section: Section, *names: str) -> list[str]:
    """Which of these options have another value than their default.

    Not `model_fields_set`: a resolved recipe (recipe.json) has all of them set, and must be read again.
    """
    fields = type(section).model_fields
    return [name for name in names if getattr(section, name) != fields[name].get_default(call_default_factory=True)]
