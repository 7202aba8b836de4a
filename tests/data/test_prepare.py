"""The data stage: files in, checked rows and a report out, and the same rows for all who come later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_templates import PHI, chat

from conftest import write_jsonl
from edgetune.data.batch import Encoded, collate, encode_file
from edgetune.data.batch import load as read_prepared
from edgetune.data.prepare import Prepared, prepare
from edgetune.data.render import Renderer
from edgetune.errors import InputError
from edgetune.recipe import DataSection

STOP = {2}


def load(path: Path) -> list[dict[str, Any]]:
    return list(read_prepared(path))


@pytest.fixture
def tiny(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def section(**values: Any) -> DataSection:
    return DataSection.model_validate({k: str(v) if isinstance(v, Path) else v for k, v in values.items()})


def prepared(data: DataSection, tokenizer: Any, out: Path, stop_ids: set[int] = STOP) -> Prepared:
    out.mkdir(exist_ok=True)
    return prepare(data, seed=1, tokenizer=tokenizer, context=512, stop_ids=stop_ids, out=out)


def test_files_and_report(tmp_path: Path, tiny: Any, tiny_rows: list[Any]) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", tiny_rows)
    done = prepared(section(train=file, validation={"auto": 0.25}), tiny, tmp_path / "out")
    train, validation = load(done.train), load(done.validation)
    assert (len(train), len(validation)) == (12, 4)
    lines = file.read_text().splitlines()
    for row in train + validation:
        name, line = row["where"].split(":")
        assert name == "a.jsonl"
        assert {"messages": row["messages"]} == json.loads(lines[int(line) - 1])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report == done.report
    assert report["rows"] == {"read": {"a.jsonl": 16}, "train": 12, "validation": 4}
    assert report["form"] == {"train": "messages"}
    assert report["turn"] == {"before": "", "after": "<|im_end|>", "stop": "<|im_end|>", "stop_id": 2}
    assert sum(bar["rows"] for bar in report["histogram"]) == 16
    assert report["warnings"] == []
    encoded = encode_file(done.train, Renderer(tiny), "assistant", 512)
    assert report["tokens"]["train"] == sum(len(row.ids) for row in encoded)
    assert report["learned"]["train"] == sum(sum(row.learned) for row in encoded)
    assert str(tmp_path) not in (tmp_path / "out" / "train.jsonl").read_text()


def test_two_runs_are_equal(tmp_path: Path, tiny: Any, tiny_rows: list[Any]) -> None:
    data = section(train=write_jsonl(tmp_path / "a.jsonl", tiny_rows))
    for out in ("one", "two"):
        prepared(data, tiny, tmp_path / out)
    for name in ("train.jsonl", "validation.jsonl", "report.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_several_files_of_several_kinds(tmp_path: Path, tiny: Any, tiny_rows: list[Any]) -> None:
    one = write_jsonl(tmp_path / "a.jsonl", tiny_rows[:2])
    (tmp_path / "b.json").write_text(json.dumps(tiny_rows[2:4]))
    held = tmp_path / "v.csv"
    held.write_text("prompt,completion\nQ,A\n")
    data = section(train=[str(one), str(tmp_path / "b.json")], validation=held)
    done = prepared(data, tiny, tmp_path / "out")
    assert [row["where"] for row in load(done.train)] == [
        "a.jsonl:1",
        "a.jsonl:2",
        "b.json:row 1",
        "b.json:row 2",
    ]
    assert done.report["form"] == {"train": "messages", "validation": "prompt-completion"}


def test_duplicates_stay_on_one_side_and_are_counted(tmp_path: Path, tiny: Any, tiny_rows: list[Any]) -> None:
    data = section(train=write_jsonl(tmp_path / "a.jsonl", tiny_rows[:4] * 5), validation={"auto": 0.5})
    done = prepared(data, tiny, tmp_path / "out")
    train = {json.dumps(row["messages"]) for row in load(done.train)}
    validation = {json.dumps(row["messages"]) for row in load(done.validation)}
    assert len(train) == len(validation) == 2
    assert not train & validation
    assert done.report["duplicates"] == {"train": 8, "validation": 8}


def test_overlap_leaves_the_training_side(tmp_path: Path, tiny: Any, tiny_rows: list[Any]) -> None:
    train = write_jsonl(tmp_path / "a.jsonl", tiny_rows[:6])
    held = write_jsonl(tmp_path / "v.jsonl", [{**tiny_rows[1], "id": 3}, tiny_rows[9]])
    done = prepared(section(train=train, validation=held), tiny, tmp_path / "out")
    assert [row["where"] for row in load(done.train)] == [f"a.jsonl:{n}" for n in (1, 3, 4, 5, 6)]
    assert len(load(done.validation)) == 2
    assert done.report["overlap"] == 1
    assert any("left out of training" in warning for warning in done.report["warnings"])
    with pytest.raises(InputError, match="every training row is also a validation row"):
        prepared(section(train=held, validation=held), tiny, tmp_path / "out")


def test_all_problems_come_at_once_and_nothing_is_written(tmp_path: Path, tiny: Any, tiny_rows: list[Any]) -> None:
    rows = [*tiny_rows, '{"messages": ', chat("Q", " "), chat("Q", "A <|im_end|>"), chat("Q " * 400, "A")]
    with pytest.raises(InputError) as error:
        prepared(section(train=write_jsonl(tmp_path / "a.jsonl", rows)), tiny, tmp_path / "out")
    lines = [line for line in str(error.value).splitlines() if line.startswith("a.jsonl:")]
    assert [line.split(" ")[0] for line in lines] == [
        "a.jsonl:17:",
        "a.jsonl:18:",
        "a.jsonl:19:",
        "a.jsonl:20:",
    ]
    assert "the limit is 512" in lines[3]
    assert list((tmp_path / "out").iterdir()) == []


def test_rows_that_are_too_long(tmp_path: Path, tiny: Any, tiny_rows: list[Any]) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [*tiny_rows, chat("Q", "A " * 400)])
    held = write_jsonl(tmp_path / "v.jsonl", [chat("Q", "A")])
    with pytest.raises(InputError, match=r"a.jsonl:17: the row has [0-9,]+ tokens, the limit is 128"):
        prepared(section(train=file, validation=held, max_length=128), tiny, tmp_path / "out")
    dropped = prepared(section(train=file, validation=held, max_length=128, too_long="drop"), tiny, tmp_path / "out")
    assert len(load(dropped.train)) == 16
    assert dropped.report["too_long"] == {"limit": 128, "rows": 1, "truncated": 0, "dropped": 1}
    cut = prepared(section(train=file, validation=held, max_length=128, too_long="truncate"), tiny, tmp_path / "out")
    encoded = encode_file(cut.train, Renderer(tiny), "assistant", 128)
    assert max(len(row.ids) for row in encoded) == 128
    assert cut.report["tokens"]["train"] == sum(len(row.ids) for row in encoded)
    assert cut.report["learned"]["train"] == sum(sum(row.learned) for row in encoded)
    assert cut.report["too_long"]["truncated"] == 1


def test_a_cut_that_leaves_nothing_to_learn_is_named(tmp_path: Path, tiny: Any, tiny_rows: list[Any]) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [*tiny_rows, chat("Q " * 400, "A")])
    with pytest.raises(InputError, match=r"a.jsonl:17: .* nothing to learn in the 128"):
        prepared(section(train=file, max_length=128, too_long="truncate"), tiny, tmp_path / "out")


def test_every_row_dropped(tmp_path: Path, tiny: Any, tiny_rows: list[Any]) -> None:
    data = section(train=write_jsonl(tmp_path / "a.jsonl", tiny_rows), max_length=8, too_long="drop")
    with pytest.raises(InputError, match="every row is over the limit and was dropped"):
        prepared(data, tiny, tmp_path / "out")


def test_max_length_over_the_context(tmp_path: Path, tiny: Any, tiny_rows: list[Any]) -> None:
    data = section(train=write_jsonl(tmp_path / "a.jsonl", tiny_rows), max_length=513)
    with pytest.raises(InputError, match=r"data.max_length: .*513 tokens, the model's context is 512"):
        prepared(data, tiny, tmp_path / "out")


def test_one_row_cannot_be_split(tmp_path: Path, tiny: Any) -> None:
    with pytest.raises(InputError, match="there is one row"):
        prepared(section(train=write_jsonl(tmp_path / "a.jsonl", [chat("Q", "A")])), tiny, tmp_path / "out")


def test_chat_and_text_do_not_mix(tmp_path: Path, tiny: Any, tiny_rows: list[Any]) -> None:
    train = write_jsonl(tmp_path / "a.jsonl", tiny_rows)
    held = write_jsonl(tmp_path / "v.jsonl", [{"text": "Once."}])
    with pytest.raises(InputError, match="one is plain text, one is chat"):
        prepared(section(train=train, validation=held), tiny, tmp_path / "out")


def test_plain_text_needs_no_template(tmp_path: Path, tiny: Any) -> None:
    tiny.chat_template = None
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": f"Story {n}."} for n in range(10)])
    done = prepared(section(train=file), tiny, tmp_path / "out")
    assert done.report["turn"] is None
    assert done.report["settings"]["train_on"] == "all"
    assert len(encode_file(done.train, Renderer(tiny), "assistant", 512)) == 9


def test_a_model_that_would_not_stop_is_warned_of(tmp_path: Path, tiny: Any, tiny_rows: list[Any]) -> None:
    tiny.chat_template = PHI
    data = section(train=write_jsonl(tmp_path / "a.jsonl", tiny_rows))
    warnings = prepared(data, tiny, tmp_path / "out", stop_ids={0}).report["warnings"]
    assert "<|im_end|> (id 2), which is not among the model's stop ids (0)" in warnings[0]


def test_a_prepared_file_that_is_missing_or_broken(tmp_path: Path, tiny: Any) -> None:
    with pytest.raises(InputError, match="no such file of prepared rows"):
        load(tmp_path / "train.jsonl")
    (tmp_path / "train.jsonl").write_text('{"messages": [')
    with pytest.raises(InputError, match="not a whole file"):
        load(tmp_path / "train.jsonl")
    write_jsonl(tmp_path / "train.jsonl", [{**chat("Q", "<|im_end|>"), "where": "a.jsonl:7"}])
    with pytest.raises(InputError, match=r"a\.jsonl:7: turn 2 holds"):
        encode_file(tmp_path / "train.jsonl", Renderer(tiny), "assistant", 512)


def test_collate() -> None:
    batch = collate([Encoded([5, 6, 7], [False, True, True]), Encoded([8, 9], [False, True])], pad_id=6)
    assert {name: array.dtype for name, array in batch.items()} == dict.fromkeys(batch, np.dtype(np.int64))
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 6]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100]]
