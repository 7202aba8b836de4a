"""Targets: what kind of device an artifact is for. A YAML file each in `export/`, or one of the user's own."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, ValidationError

from edgetune.errors import InputError
from edgetune.recipe_file import shipped
from edgetune.recipe_section import Section


class Target(Section):
    """One edge device profile."""

    description: str = Field(description="What it is for.")
    needs: str = Field(description="What it needs on the device.")
    provider: Literal["cpu"] = Field(description="ONNX Runtime execution provider.")
    precision: Literal["fp32", "int8", "int4"] = Field(description="Precision of the weights.")
    options: dict[str, str | int | float | bool] = Field(
        default_factory=dict, description="Further options of the ONNX Runtime GenAI model builder."
    )


def names() -> list[str]:
    """The targets that come with edgetune."""
    return sorted(path.stem for path in shipped("export").glob("*.yaml"))


def load_target(name: str) -> Target:
    """Read a target by name or by its file.

    Raises:
        InputError: there is no such target, or its file is wrong.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else shipped("export") / f"{name}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(name, names(), 1, 0.4)
        raise InputError(
            f"there is no target `{name}`",
            where="export.target",
            fix=(f"did you mean `{near[0]}`? " if near else "")
            + f"targets: {', '.join(names())}, or a YAML file of your own",
        )
    try:
        return Target.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"not valid YAML: {str(error).splitlines()[0]}", where=path) from error
    except ValidationError as error:
        problems = "; ".join(f"`{'.'.join(map(str, p['loc']))}`: {p['msg'].lower()}" for p in error.errors())
        raise InputError(problems, where=path, fix=f"compare it with {shipped('export') / 'cpu-int8.yaml'}") from error
