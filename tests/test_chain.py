"""Where a model comes from is kept through every step, and not claimed of what was changed afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edgetune.chain import describe, of_adapter, of_adapters, of_folder, of_run, of_training
from edgetune.models import resolve
from edgetune.recipe import ExportSection, ModelSection, Recipe
from edgetune.run import RunFolder, Work, seal
from edgetune.standalone import export_model


def _run(folder: Path, model: Path) -> RunFolder:
    """A run folder as data and training leave it."""
    run = RunFolder(folder)
    for name in ("data", "adapter"):
        run_folder = folder / name
        run_folder.mkdir(parents=True)
        (run_folder / ("train.jsonl" if name == "data" else "adapter.safetensors")).write_text("{}")
    seal(folder / "data", Work("data", {"train rows": ["a" * 64, "b" * 64]}, {}))
    recipe = _recipe(model)
    seal(folder / "adapter", Work("train", {}, {}), chain=of_training(run, recipe, resolve(recipe.model)))
    return run


def _recipe(model: Path) -> Recipe:
    data = {"train": ["one.jsonl", "elsewhere/two.jsonl"]}
    return Recipe.model_validate({"model": {"id": str(model)}, "data": data})


def _merged(folder: Path, model: Path, **extra: object) -> Path:
    shutil.copytree(model, folder)
    seal(folder, Work("merge", {}, {}), **extra)
    return folder


def test_a_merged_folder_keeps_base_licence_and_data(tiny_model: Path, tmp_path: Path) -> None:
    licensed = Path(shutil.copytree(tiny_model, tmp_path / "tiny-base"))
    (licensed / "README.md").write_text("---\nlicense: mit\n---\n")
    run = _run(tmp_path / "run", licensed)
    chain = of_run(run, _recipe(licensed), resolve(_recipe(licensed).model))
    assert chain["base"]["id"] == "tiny-base" and chain["base"]["license"] == "mit"
    assert [one["name"] for one in chain["data_files"]] == ["one.jsonl", "two.jsonl", "data/train.jsonl"]
    assert chain["data_files"][1]["sha256"] == "b" * 64 and chain["data"] == run.content("data")
    assert str(tmp_path) not in json.dumps(chain)
    base = resolve(_recipe(licensed).model)
    assert of_adapter(tmp_path / "run" / "adapter", base) == chain

    both = of_adapters([tmp_path / "run" / "adapter", _run(tmp_path / "other", licensed).path / "adapter"], base)
    assert both["base"] == chain["base"] and both["data_files"] == chain["data_files"] and "adapter" not in both
    assert of_adapters([tmp_path], base) == {"base": describe(base)}

    merged = _merged(tmp_path / "merged", tiny_model, chain=chain)
    assert of_folder(resolve(ModelSection(id=str(merged)))) == chain
    # Trained on: the first base stays the base, and both runs' data are told of.
    second = of_training(_run(tmp_path / "second", merged), _recipe(merged), resolve(_recipe(merged).model))
    assert second["base"] == chain["base"] and second["data_files"][:3] == chain["data_files"]


def test_an_export_of_a_merged_folder_carries_its_chain(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = {"base": {"id": "org/base", "license": "mit", "sha256": "0"}, "data": "1" * 64, "adapter": "2" * 64}
    merged, told = _merged(tmp_path / "merged", tiny_model, chain=chain), []
    monkeypatch.setattr("edgetune.export.package.export", lambda *_, **how: told.append(how["chain"]) or {})
    export_model(merged, tmp_path / "out", ExportSection(target="cpu-fp32"))
    assert told == [chain]


def test_what_was_changed_or_made_by_others_is_a_base_of_its_own(tiny_model: Path, tmp_path: Path) -> None:
    base = {"id": "another", "source": "hub", "license": "mit", "revision": None, "upstream": None, "sha256": "0"}
    merged = _merged(tmp_path / "merged", tiny_model, chain={"base": base})
    (merged / "chat_template.jinja").write_text("other")
    found = resolve(ModelSection(id=str(merged)))
    assert of_folder(found) == {"base": describe(found)} and describe(found)["id"] == "merged"
    plain = resolve(ModelSection(id=str(tiny_model)))
    assert of_folder(plain) == of_adapter(tmp_path, plain) == {"base": describe(plain)}
