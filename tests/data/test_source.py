"""Rows are read as often as need be and not kept: what is remembered, what is noticed, and how much memory it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import write_jsonl
from edgetune.data import examine as examining
from edgetune.data.check import check
from edgetune.data.examine import examine, outlets
from edgetune.data.problems import Problems
from edgetune.data.source import Kept, Source, key
from edgetune.errors import InputError
from edgetune.recipe import DataSection


def surveyed(*files: Path, form: str = "auto") -> Source:
    problems, source = Problems(), Source([(file, file.name) for file in files])
    source.survey("train", form, problems)
    assert problems.items == []
    return source


def text(value: Any) -> dict[str, Any]:
    return {"text": f"row {value}"}


def test_rows_have_numbers_places_and_one_form(tmp_path: Path) -> None:
    one = write_jsonl(tmp_path / "a.jsonl", [text(0), {"text": " "}, {**text(1), "id": 3}])
    two = tmp_path / "b.csv"
    two.write_text("text\nrow 2\n")
    source, extra, problems = surveyed(one, two), Counter[str](), Problems()
    assert (source.form, source.read, source.count) == ("text", {"a.jsonl": 3, "b.csv": 1}, 4)
    rows = list(source.normalized(extra, problems))
    assert [(row.number, row.where, row.values) for row in rows] == [
        (0, "a.jsonl:1", text(0)),
        (2, "a.jsonl:3", text(1)),
        (3, "b.csv:2", text(2)),
    ]
    assert extra == {"id": 1}
    assert [problem.where for problem in problems.items] == ["a.jsonl:2"]


def test_a_file_named_twice_is_read_twice(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [text(n) for n in range(4)])
    section = DataSection(train=[str(file), str(file)])
    said = check(section, seed=1, model=None).report
    assert said["rows"]["read"] == {"a.jsonl": 8}
    assert said["duplicates"]["train"] == said["rows"]["train"] // 2


def test_a_file_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [text(n) for n in range(4)])
    source = surveyed(file)
    write_jsonl(file, [text(n) for n in range(5)])
    with pytest.raises(InputError, match="changed while it was read"):
        list(source.normalized())
    source = surveyed(file)
    rows = source.normalized()
    next(rows)
    write_jsonl(file, [text(n) for n in range(6)])
    with pytest.raises(InputError, match="changed while it was read"):
        list(rows)
    source = surveyed(file)
    file.unlink()
    with pytest.raises(InputError, match="changed while it was read"):
        list(source.normalized())


def test_equal_rows_have_equal_keys() -> None:
    assert key({"a": 1, "b": 2}) == key({"b": 2, "a": 1}) != key({"a": 1})
    assert len(key({})) == 16


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=st.lists(st.tuples(st.binary(min_size=16, max_size=16), st.integers(0, 2**40)), max_size=20))
def test_what_is_remembered_comes_back(rows: list[tuple[bytes, int]]) -> None:
    kept = Kept()
    for number, (name, length) in enumerate(rows):
        kept.add(number, name, length, length // 2)
    found = kept.arrays()
    assert found["numbers"].tolist() == list(range(len(rows)))
    assert [name.ljust(16, b"\0") for name in found["keys"].tolist()] == [name for name, _ in rows]
    assert found["tokens"].tolist() == [length for _, length in rows]
    assert found["learned"].tolist() == [length // 2 for _, length in rows]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(numbers=st.lists(st.integers(0, 6), min_size=2, max_size=30), held=st.booleans(), seed=st.integers(0, 9))
def test_the_rows_of_both_sides_are_those_that_were_told_apart(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[int], held: bool, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("sides")
    file = write_jsonl(folder / "a.jsonl", [text(n) for n in numbers])
    given_file = write_jsonl(folder / "v.jsonl", [text(n) for n in numbers[:3]])
    section = DataSection(train=str(file), **({"validation": str(given_file)} if held else {}))  # type: ignore[arg-type]
    found = examine(section, seed=seed, encoder=None)
    paths = {Path("train"): found.train, Path("validation"): found.validation}
    rows: dict[Path, list[Any]] = {path: [] for path in paths}
    for path, row in outlets(paths):
        rows[path].append(row)
    for path, side in paths.items():
        assert [row.number for row in rows[path]] == side.numbers.tolist()
        assert [key(row.values).rstrip(b"\0") for row in rows[path]] == side.keys.tolist()
        assert side.first() == (rows[path][0].values if rows[path] else None)
    keys = [{key(row.values) for row in some} for some in rows.values()]
    assert not keys[0] & keys[1]
    given_rows = len(numbers[:3]) if held else 0
    assert sum(map(len, rows.values())) == len(numbers) - found.counts.overlap + given_rows


MEASURED = """
import json, sys
from pathlib import Path
import numpy, numpy.ma
from edgetune.data.prepare import prepare
from edgetune.data.batch import encode_file
from edgetune.data.check import check
from edgetune.data.render import Renderer
from edgetune.recipe import DataSection
from edgetune.runtime.memory import peak_rss_mb, reset_peak
file, model, out = (Path(name) for name in sys.argv[1:4])
section = DataSection(train=[str(file)], max_length=None)
check(DataSection(train=str(file.with_name("small.jsonl"))), seed=1, model=None)
if model.name:
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(model)
    prepare(DataSection(train=str(file.with_name("small.jsonl"))), seed=1, tokenizer=tokenizer, context=10**6, stop_ids={0}, out=out, workers=1)
reset_peak()
before = peak_rss_mb()
if model.name:
    prepare(section, seed=1, tokenizer=tokenizer, context=10**6, stop_ids={0}, out=out, workers=int(sys.argv[4]))
    rows = encode_file(out / "train.jsonl", Renderer(tokenizer, {0}), "assistant", 10**6)
    said = {"rows": len(rows)}
else:
    said = {"rows": check(section, seed=1, model=None).report["rows"]["train"]}
print(json.dumps({**said, "grew_mb": peak_rss_mb() - before}))
"""


def many_rows(file: Path, megabytes: int, words: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    filler = " ".join(["capital", "river", "answer", "question"] * (words // 4))
    row = '{{"text": "row {0} ' + filler + '"}}\n'
    with file.open("w", encoding="utf-8") as out:
        for number in range(megabytes * 1_000_000 // len(row)):
            out.write(row.format(" ".join(str(number))))
    write_jsonl(file.with_name("small.jsonl"), [text(" ".join(str(n))) for n in range(20)])


def word_model(folder: Path) -> Path:
    """A tokenizer of whole words, as quick as one can be."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<end>", "row", "capital", "river", "answer", "question", *"0123456789"]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<end>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>").save_pretrained(folder)
    return folder


def measured(file: Path, model: str | Path, out: Path, workers: int = 1) -> dict[str, Any]:
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, file, model, out, str(workers)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak can be reset on Linux only")
def test_checking_takes_no_memory_for_the_rows(tmp_path: Path) -> None:
    many_rows(tmp_path / "a.jsonl", 60, 400)
    found = measured(tmp_path / "a.jsonl", "", tmp_path / "out")
    assert found["rows"] > 15_000
    assert found["grew_mb"] < 20


@pytest.mark.skipif(sys.platform != "linux", reason="the peak can be reset on Linux only")
@pytest.mark.parametrize(("megabytes", "workers"), [(12, 1), pytest.param(150, 2, marks=pytest.mark.slow)])
def test_preparing_takes_no_memory_for_the_rows(tmp_path: Path, megabytes: int, workers: int) -> None:
    many_rows(tmp_path / "a.jsonl", megabytes, 4000)
    found = measured(tmp_path / "a.jsonl", word_model(tmp_path / "model"), tmp_path / "out", workers)
    assert found["rows"] > 30 * megabytes * 0.9
    assert found["grew_mb"] < min(megabytes, 40)


def test_without_a_form_nothing_more_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"question": "Q"}])
    monkeypatch.setattr(examining, "split", lambda *a: pytest.fail("nothing to split"))
    found = examine(DataSection(train=str(file)), seed=1, encoder=None)
    assert (len(found.train), found.problems.count) == (0, 1)
    assert found.train.first() is None
