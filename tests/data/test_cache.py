"""Encoded rows on disk: used only as they were written, whole or absent, and no more of them than there is room for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_templates import chat
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import write_jsonl
from edgetune.data import cache
from edgetune.data.batch import encode_file
from edgetune.data.cache import Writer, find, rows_home
from edgetune.data.parallel import Tokens
from edgetune.data.prepare import prepare
from edgetune.data.render import Encoded, Renderer
from edgetune.recipe import DataSection

ROW = st.lists(st.tuples(st.integers(0, 65535), st.booleans()), max_size=6)


@pytest.fixture
def tiny(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows by one whenever a row is encoded."""
    seen: list[Any] = []
    plain = Renderer.encode

    def counted(self: Renderer, row: Any, train_on: Any) -> Encoded:
        seen.append(row)
        return plain(self, row, train_on)

    monkeypatch.setattr(Renderer, "encode", counted)
    return seen


def prepared(tmp_path: Path, tokenizer: Any, rows: list[Any], **values: Any) -> Path:
    section = DataSection.model_validate({"train": str(write_jsonl(tmp_path / "a.jsonl", rows)), **values})
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    return prepare(section, seed=1, tokenizer=tokenizer, context=512, stop_ids={2}, out=out).train


def plain(rows: Any) -> list[tuple[list[int], list[bool]]]:
    return [(row.ids, row.learned) for row in rows]


def entries() -> list[Path]:
    return sorted(path for path in rows_home().iterdir() if not path.name.startswith("."))


def written(rows: list[list[tuple[int, bool]]], token_bytes: int = 2) -> Writer:
    writer = Writer(token_bytes)
    for row in rows:
        ids = np.array([i for i, _ in row], f"<u{token_bytes}").tobytes()
        writer.add(Tokens(ids, bytes(learned for _, learned in row), len(row), sum(x for _, x in row), frozenset()))
    return writer


def test_what_the_data_stage_encoded_is_not_encoded_again(
    tmp_path: Path, tiny: Any, tiny_rows: list[Any], encodings: list[Any]
) -> None:
    train = prepared(tmp_path, tiny, tiny_rows, validation={"auto": 0.25})
    assert len(encodings) == 16
    found = {
        name: encode_file(train.with_name(f"{name}.jsonl"), Renderer(tiny, {2}), "assistant", 512)
        for name in ("train", "validation")
    }
    assert len(encodings) == 16
    for name, rows in found.items():
        values = [json.loads(line) for line in train.with_name(f"{name}.jsonl").read_text().splitlines()]
        assert plain(rows) == plain(Renderer(tiny, {2}).encode(row, "assistant") for row in values)
    assert len(entries()) == 2
    assert not list(rows_home().glob(".tmp-*"))


def test_overlap_drops_and_cuts_reach_the_kept_rows(
    tmp_path: Path, tiny: Any, tiny_rows: list[Any], encodings: list[Any]
) -> None:
    held = write_jsonl(tmp_path / "v.jsonl", [tiny_rows[1], tiny_rows[5], chat("Q", "A " * 400)])
    for too_long, rows in (("drop", 14), ("truncate", 15)):
        values = {"validation": str(held), "max_length": 128, "too_long": too_long}
        train = prepared(tmp_path, tiny, [*tiny_rows, chat("R", "A " * 300)], **values)
        before = len(encodings)
        found = encode_file(train, Renderer(tiny, {2}), "assistant", 128)
        assert (len(found), len(encodings)) == (rows, before)
        again = [Renderer(tiny, {2}).encode(json.loads(line), "assistant") for line in train.read_text().splitlines()]
        assert plain(found) == [(row.ids[:128], row.learned[:128]) for row in again]
        assert found.lengths.tolist() == [len(row.ids) for row in found]
        assert found.learned_counts.tolist() == [sum(row.learned) for row in found]


@pytest.mark.parametrize(
    ("change", "arguments"),
    [
        ("nothing", {}),
        ("stop ids", {"stop_ids": {2, 0}}),
        ("template", {"chat_template": "{# another #}"}),
        ("train_on", {"train_on": "all"}),
        ("limit", {"max_length": 100}),
        ("rows", {"row": chat("other", "row")}),
    ],
)
def test_whatever_decides_the_tokens_is_part_of_the_key(
    tmp_path: Path, tiny: Any, tiny_rows: list[Any], encodings: list[Any], change: str, arguments: dict[str, Any]
) -> None:
    train = prepared(tmp_path, tiny, tiny_rows)
    before = len(encodings)
    tiny.chat_template += arguments.get("chat_template", "")
    if "row" in arguments:
        write_jsonl(train, [arguments["row"]])
    renderer = Renderer(tiny, arguments.get("stop_ids", {2}))
    encode_file(train, renderer, arguments.get("train_on", "assistant"), arguments.get("max_length", 512))
    assert (len(encodings) > before) == (change != "nothing")


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _lie(entry: Path) -> None:
    """All hashes fit, the numbers do not."""
    manifest = json.loads((entry / "manifest.json").read_text())
    (entry / "manifest.json").write_text(json.dumps({**manifest, "tokens": manifest["tokens"] + 1}))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit of the tokens": lambda entry: _flip(entry / "tokens.bin"),
    "a bit of what is learned": lambda entry: _flip(entry / "learned.bin"),
    "a bit of the lengths": lambda entry: _flip(entry / "lengths.bin"),
    "the end of the tokens": lambda entry: os.truncate(entry / "tokens.bin", 10),
    "a file": lambda entry: (entry / "counts.bin").unlink(),
    "the manifest": lambda entry: (entry / "manifest.json").unlink(),
    "half of the manifest": lambda entry: os.truncate(entry / "manifest.json", 40),
    "another kind of manifest": lambda entry: (entry / "manifest.json").write_text("[1]"),
    "the format": lambda entry: (entry / "manifest.json").write_text('{"format": "other/1"}'),
    "a number in the manifest": _lie,
    "a file too many": lambda entry: (entry / "more.bin").write_bytes(b"x"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_is_not_as_it_was_written_is_made_again(
    tmp_path: Path, tiny: Any, tiny_rows: list[Any], encodings: list[Any], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train = prepared(tmp_path, tiny, tiny_rows)
    good = plain(encode_file(train, Renderer(tiny, {2}), "assistant", 512))
    names = [entry.name for entry in entries()]
    for entry in entries():
        DAMAGE[what](entry)
    before = len(encodings)
    assert plain(encode_file(train, Renderer(tiny, {2}), "assistant", 512)) == good
    assert len(encodings) == before + len(good)
    assert "made again" in capsys.readouterr().err
    assert plain(encode_file(train, Renderer(tiny, {2}), "assistant", 512)) == good
    assert len(encodings) == before + len(good)
    assert [entry.name for entry in entries()] == names


def test_rows_under_another_name_are_not_trusted() -> None:
    with written([[(1, True)]]) as writer:
        writer.keep("a" * 64)
    (rows_home() / ("a" * 64)).rename(rows_home() / ("b" * 64))
    assert find("b" * 64) is None


def test_some_rows_are_encoded_alone_and_not_kept(
    tmp_path: Path, tiny: Any, tiny_rows: list[Any], encodings: list[Any]
) -> None:
    file = write_jsonl(tmp_path / "v.jsonl", tiny_rows)
    found = encode_file(file, Renderer(tiny), "assistant", 512, 3)
    assert (len(found), len(encodings), entries()) == (3, 3, [])
    assert plain(found) == plain(Renderer(tiny).encode(row, "assistant") for row in tiny_rows[:3])
    del found
    assert list(rows_home().iterdir()) == []
    assert len(encode_file(file, Renderer(tiny), "assistant", 512)) == 16
    before = len(encodings)
    assert len(encode_file(file, Renderer(tiny), "assistant", 512, 3)) == 3
    assert len(encodings) == before


def test_a_home_that_cannot_be_written(
    tmp_path: Path, tiny: Any, tiny_rows: list[Any], own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_home.write_text("a file, so that no folder can be made in it")
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    train = prepared(tmp_path, tiny, tiny_rows)
    rows = encode_file(train, Renderer(tiny, {2}), "assistant", 512)
    assert len(rows) == 14
    first = rows[:1]
    del rows
    assert len(first[0].ids) == first.lengths[0]  # a slice keeps the files
    del first
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_tokenizer_that_cannot_be_told_is_not_kept(
    tmp_path: Path, tiny: Any, tiny_rows: list[Any], encodings: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("prepare", "batch"):
        monkeypatch.setattr(f"edgetune.data.{module}.fingerprint", lambda renderer: None)
    train = prepared(tmp_path, tiny, tiny_rows)
    assert len(encode_file(train, Renderer(tiny, {2}), "assistant", 512)) == 14
    assert len(encodings) == 30


KILLED = """
import os, signal, sys
from edgetune.data.cache import Writer
from edgetune.data.parallel import Tokens
with Writer(2) as writer:
    for n in range(50_000):
        writer.add(Tokens(b"ab" * 20, bytes(20), 20, 0, frozenset()))
    if sys.argv[1] == "renaming":
        import edgetune.data.cache as cache
        cache.replace_folder = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
        writer.keep("c" * 64)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
@pytest.mark.parametrize("when", ["writing", "renaming"])
def test_killed_while_it_is_written(when: str) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, when], check=False)
    assert done.returncode == -signal.SIGKILL
    assert entries() == []
    assert len(list(rows_home().glob(".tmp-*"))) == 1
    assert find("c" * 64) is None
    with written([[(7, True)]]) as writer:
        assert plain(writer.keep("c" * 64)) == [([7], [True])]
    assert [path.name for path in rows_home().iterdir()] == ["c" * 64]


def test_what_living_processes_write_is_left_alone() -> None:
    with written([[(1, True)]]) as one, written([[(2, True)]]) as two:
        assert plain(one.keep("a" * 64)) == [([1], [True])]
        assert plain(two.keep("a" * 64)) == [([2], [True])]  # as if both had missed it
    assert plain(find("a" * 64) or []) == [([2], [True])]


def test_the_oldest_go_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [letter * 64 for letter in "abc"]
    for age, name in enumerate(names):
        with written([[(1, True)] * 500]) as writer:
            writer.keep(name)
        os.utime(rows_home() / name, (time.time() - 86_400 * (4 - age),) * 2)
    size = sum(file.stat().st_size for file in (rows_home() / names[0]).iterdir())
    monkeypatch.setattr(cache, "MOST_BYTES", int(2.5 * size))
    assert find(names[0])  # is now the last that was used
    Writer(2).__exit__()
    assert [entry.name for entry in entries()] == [names[0], names[2]]
    monkeypatch.setattr(cache, "MOST_BYTES", 0)
    Writer(2).__exit__()
    assert [entry.name for entry in entries()] == [names[0]]  # used today


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(rows=st.lists(ROW, max_size=12), data=st.data(), token_bytes=st.sampled_from([2, 4]))
def test_any_rows_come_back(monkeypatch: pytest.MonkeyPatch, rows: Any, data: Any, token_bytes: int) -> None:
    monkeypatch.setattr(cache, "_BLOCK", 4)
    expected = [([i for i, _ in row], [learned for _, learned in row]) for row in rows]
    chosen = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    with written(rows, token_bytes) as writer, Writer(token_bytes) as some:
        found = writer.rows()
        assert plain(found) == expected
        assert len(found) == len(rows)
        part = data.draw(st.slices(len(rows))) if rows else slice(None)
        assert plain(found[part]) == expected[part]
        assert found[part].lengths.tolist() == [len(ids) for ids, _ in expected[part]]
        assert found[part].learned_counts.tolist() == [sum(learned) for _, learned in expected[part]]
        some.take(writer, np.array(chosen, bool))
        assert plain(some.rows()) == [row for row, wanted in zip(expected, chosen, strict=True) if wanted]
    with pytest.raises(IndexError):
        found[len(rows)]
