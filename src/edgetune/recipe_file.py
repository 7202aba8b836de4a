"""Recipes as files: finding, reading and copying them, overrides, and what is said of a wrong one.

Unknown keys, wrong types and values out of range are refused with the file, the line and the nearest key.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from edgetune.errors import InputError
from edgetune.files import write_bytes
from edgetune.recipe import Limits, Recipe


class LoadedRecipe(BaseModel):
    """A recipe and where it was read from. Its own paths are absolute; those of overrides are as they were given."""

    model_config = ConfigDict(frozen=True)

    recipe: Recipe
    path: Path
    overrides: tuple[str, ...] = ()

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return Path(self.recipe.runs_dir) / (self.recipe.name or self.path.stem)


def shipped(kind: Literal["recipes", "export"]) -> Path:
    """The folder of the recipes or targets that come with edgetune, in a checkout and in an installed wheel."""
    package = Path(__file__).parent
    installed = package / f"_{kind}"
    return installed if installed.is_dir() else package.parent.parent / kind


def find(name: str) -> Path:
    """A recipe's file: a path, or the name of a shipped recipe (`quickstart`). Raises InputError."""
    if not name.strip():
        raise InputError("no recipe is named", fix="`edgetune recipes ls` lists the shipped ones")
    path = Path(name)
    if path.is_file():
        return path
    folder = shipped("recipes")
    names = sorted(file.stem for file in folder.glob("*.yaml"))
    if name in names:
        return folder / f"{name}.yaml"
    if path.is_dir():
        raise InputError(
            "is a folder, a recipe is a YAML file",
            where=name,
            fix="name the file; `edgetune recipes ls` lists examples",
        )
    near = difflib.get_close_matches(path.stem, names, 1, 0.5)
    raise InputError(
        "no such recipe file",
        where=name,
        fix=(f"did you mean `{near[0]}`? " if near else "") + f"shipped recipes: {', '.join(names) or 'none'}; "
        "`edgetune recipes cp NAME .` gives you one to change",
    )


def copy(name: str, to: Path) -> list[Path]:
    """Copy a recipe and the data files that it names beside it, keeping their relative paths.

    Args:
        name: a recipe file or a shipped recipe's name.
        to: a folder, or a file ending in .yaml.

    Returns:
        The files written.

    Raises:
        InputError: a file is already there.
    """
    source = find(name)
    target = to if to.suffix in (".yaml", ".yml") else to / source.name
    section = load(str(source)).recipe.data
    named = [section.train] if isinstance(section.train, str) else list(section.train)
    if isinstance(section.validation, str):
        named.append(section.validation)
    pairs = [(source, target)]
    for item in map(Path, named):
        if item.is_file() and item.is_relative_to(source.parent.absolute()):
            pairs.append((item, target.parent / item.relative_to(source.parent.absolute())))
    for _, new in pairs:
        if new.exists():
            raise InputError("is there already", where=new, fix="choose another folder or file name")
    for old, new in pairs:
        write_bytes(new, old.read_bytes())
    return [new for _, new in pairs]


def load(name: str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read a recipe and apply `key=value` overrides.

    Args:
        name: a YAML file, or a shipped recipe's name.
        overrides: dotted keys, values as YAML: `train.learning_rate=1e-4`, `data.validation={auto: 0.2}`.

    Raises:
        InputError: with every problem, each with its file and line or its override.
    """
    path = find(name)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 (byte {error.start})", where=path, fix="save the file as UTF-8") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = _Loader(text).get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"not valid YAML: {problem}", where=where, fix="check indentation and colons") from error
    if not isinstance(values, dict):
        raise InputError(
            "a recipe is a mapping of keys to values",
            where=path,
            fix="see `edgetune recipes show quickstart`",
        )
    _duplicate_keys(node, path)
    places = {key: f"{path}:{line}" for key, line in _lines(node)}
    _place(values, path.parent.absolute())
    for item in overrides:
        _override(values, item, places)
    _place(values, None)  # what an override names lies where one stands
    try:
        return LoadedRecipe(recipe=Recipe.model_validate(values), path=path, overrides=tuple(overrides))
    except ValidationError as error:
        raise InputError("\n".join(dict.fromkeys(_explain(error, places, path)))) from error


def limits_from(items: Sequence[str]) -> dict[str, float]:
    """Limits given as `NAME=VALUE`. Raises InputError: no such limit, or no such value."""
    found = {}
    for item in items:
        name, _, text = item.partition("=")
        if name not in Limits.model_fields:
            raise InputError(
                f"there is no limit `{name}`",
                where=f"`{item}`",
                fix=f"limits: {', '.join(Limits.model_fields)}",
            )
        try:
            found[name] = getattr(Limits.model_validate({name: text}), name)
        except ValidationError as error:
            raise InputError(
                error.errors()[0]["msg"].lower(), where=f"`{item}`", fix="for example kld_mean=0.1"
            ) from error
    return found


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 2e-4 as the number that people mean (YAML 1.1 wants 2.0e-4)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def _lines(node: Any, prefix: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            yield name, key.start_mark.line + 1
            yield from _lines(value, f"{name}.")
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield f"{prefix}{index}", value.start_mark.line + 1


def _duplicate_keys(node: Any, path: Path) -> None:
    seen: dict[str, int] = {}
    for key, line in _lines(node):
        if key in seen:
            raise InputError(
                f"key `{key}` stands twice (first in line {seen[key]})",
                where=f"{path}:{line}",
                fix="keep one of them",
            )
        seen[key] = line


def _place(values: dict[str, Any], folder: Path | None) -> None:
    """Expand `~` in paths, and put `folder`, if given, before those that are relative; in place."""

    def absolute(item: Any) -> Any:
        if not isinstance(item, str) or not item:
            return item
        if folder is None:
            return str(Path(item).expanduser()) if item.startswith("~") else item
        return str(folder / Path(item).expanduser())

    data, model, export = (values.get(key) for key in ("data", "model", "export"))
    if isinstance(data, dict):
        train = data.get("train")
        data["train"] = [absolute(item) for item in train] if isinstance(train, list) else absolute(train)
        if isinstance(data.get("validation"), str):
            data["validation"] = absolute(data["validation"])
        if data.get("train") is None:
            data.pop("train", None)
    if isinstance(values.get("runs_dir"), str) and values["runs_dir"].startswith("~"):
        values["runs_dir"] = str(Path(values["runs_dir"]).expanduser())
    if isinstance(model, dict):
        if isinstance(model.get("chat_template"), str):
            model["chat_template"] = absolute(model["chat_template"])
        name = model.get("id")
        if isinstance(name, str) and (name.startswith((".", "~")) or name.endswith(".gguf")):
            model["id"] = absolute(name)
    if (
        isinstance(export, dict)
        and isinstance(export.get("target"), str)
        and export["target"].endswith((".yaml", ".yml"))
    ):
        export["target"] = absolute(export["target"])


def _override(values: dict[str, Any], item: str, places: dict[str, str]) -> None:
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise InputError(
            "an override is written key=value", where=f"`{item}`", fix="for example train.learning_rate=1e-4"
        )
    try:
        value = _Loader(text).get_single_data()
    except yaml.YAMLError as error:
        raise InputError(f"the value is not valid YAML: {text}", where=f"`{item}`", fix="quote it") from error
    at: Any = values
    *parents, last = key.split(".")
    for depth, parent in enumerate(parents):
        inner = at.get(parent)
        if not isinstance(inner, dict):  # absent, null, or a plain value that a mapping replaces
            inner = at[parent] = {}
        at = inner
        places.setdefault(".".join(parents[: depth + 1]), f"`{item}`")
    at[last] = value
    for known in [k for k in places if k == key or k.startswith(f"{key}.")]:
        del places[known]
    places[key] = f"`{item}`"


def _explain(error: ValidationError, places: dict[str, str], path: Path) -> Iterator[str]:
    problems = error.errors()
    deeper = {tuple(p["loc"][:depth]) for p in problems for depth in range(1, len(p["loc"]) - 1)}
    for problem in problems:
        if problem["type"] in ("string_type", "list_type") and tuple(problem["loc"][:-1]) in deeper:
            continue  # the other branch of a union, of which another branch has the real mistake
        parts = [str(p) for p in problem["loc"] if not _is_union_tag(str(p))]
        key = ".".join(parts)
        where = next((places[k] for k in _upwards(parts) if k in places), str(path))
        if problem["type"] == "refused":  # a combination; it knows its key and its cure
            said = problem["ctx"]
            where = next((places[k] for k in _upwards(said["key"].split(".")) if k in places), str(path))
            yield f"{where}: `{said['key']}`: {said['what']}\n  fix: {said['fix']}"
        elif problem["type"] == "extra_forbidden":
            yield f"{where}: there is no key `{key}`\n  fix: {_nearest_key(parts)}"
        elif problem["type"] == "missing":
            yield f"{where}: `{key}` is missing\n  fix: add it; `edgetune recipes schema` describes each key"
        else:
            message = _PLAINLY.get(problem["type"]) or problem["msg"].removeprefix("Value error, ")
            message = message[:1].lower() + message[1:]
            given = "" if problem["type"] == "value_error" else f", not {problem['input']!r}"
            yield f"{where}: {f'`{key}`: ' if key else ''}{message}{given}\n  fix: {_described(parts)}"


# What pydantic words for programmers.
_PLAINLY = {
    "model_type": "must be a mapping of keys to values",
    "string_pattern_mismatch": "must be letters, digits, `.`, `_` and `-`, beginning with a letter or digit",
}


def _described(parts: list[str]) -> str:
    """What a key is for, from the recipe's own description of it."""
    parts = [part for part in parts if not part.isdigit()] or ["recipe"]
    for section in _sections_at(parts[:-1]):
        field = section.model_fields.get(parts[-1])
        if field is not None and field.description:
            return f"`{'.'.join(parts)}` is: {field.description}"
    return "`edgetune recipes schema` describes each key"


def _sections_at(parents: list[str]) -> Iterator[type[BaseModel]]:
    section: type[BaseModel] = Recipe
    for part in parents:
        found = next(_sections(section, part), None)
        if found is None:
            return
        section = found
    yield section


def _nearest_key(parts: list[str]) -> str:
    *parents, last = parts
    here = list(_fields(parents))
    elsewhere = [full for full in _all_keys() if full.rsplit(".", 1)[-1] == last]
    near = elsewhere or [".".join([*parents, name]) for name in difflib.get_close_matches(last, here, 1, 0.5)]
    return f"did you mean `{near[0]}`?" if near else f"known keys here: {', '.join(here)}"


def _is_union_tag(part: str) -> bool:
    """Whether pydantic put the name of a union's branch into an error's place."""
    return part in {
        "str",
        "list[str]",
        "AutoValidation",
        "EarlyStopping",
        "constrained-str",
    } or part.startswith(("literal[", "function-"))


def _upwards(parts: list[str]) -> Iterable[str]:
    return (".".join(parts[:n]) for n in range(len(parts), 0, -1))


def _fields(parents: list[str]) -> Iterable[str]:
    return next((section.model_fields for section in _sections_at(parents)), ())


def _sections(section: type[BaseModel], name: str) -> Iterator[type[BaseModel]]:
    field = section.model_fields.get(name)
    if field is None:
        return
    kinds = getattr(field.annotation, "__args__", None) or (field.annotation,)
    yield from (kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))


def _all_keys(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    for name in section.model_fields:
        yield f"{prefix}{name}"
        for inner in _sections(section, name):
            yield from _all_keys(inner, f"{prefix}{name}.")
