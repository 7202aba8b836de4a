"""Files to rows: every kind of file, every kind of damage, and the place where it is."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetune.data.problems import Problems
from edgetune.data.read import Row, names, read
from edgetune.errors import InputError

TEXT = st.text(st.characters(exclude_categories=("Cs",)))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | TEXT, lambda v: st.lists(v, max_size=3)
)
ROWS = st.lists(st.dictionaries(TEXT, VALUES, max_size=4), min_size=1, max_size=5)


def rows_of(path: Path) -> list[Row]:
    problems = Problems()
    rows = list(read(path, problems))
    assert problems.items == []
    return rows


def problems_of(path: Path) -> list[str]:
    problems = Problems()
    list(read(path, problems))
    return [f"{problem.where}: {problem.what}" for problem in problems.items]


def test_jsonl_with_mark_crlf_and_blank_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n   \n{"a": "\xc3\xa9\xe2\x80\xa8"}')
    assert rows_of(file) == [Row({"a": 1}, "a.jsonl:1"), Row({"a": "é\u2028"}, "a.jsonl:4")]


def test_json_list(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(b'\xef\xbb\xbf[\n{"a": 1},\n{"a": 2}\n]')
    assert rows_of(file) == [Row({"a": 1}, "a.json:row 1"), Row({"a": 2}, "a.json:row 2")]


def test_csv_lines_are_those_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b'\xef\xbb\xbf\r\na, b\r\n"one\r\nmore\n","x,""y"""\r\n\r\n2,\r\n')
    assert rows_of(file) == [
        Row({"a": "one\r\nmore\n", "b": 'x,"y"'}, "a.csv:3"),
        Row({"a": "2", "b": ""}, "a.csv:7"),
    ]


def test_csv_with_a_very_long_cell(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("text\n" + "x" * 200_000 + "\n")
    assert len(rows_of(file)[0].values["text"]) == 200_000


def test_csv_of_an_old_mac(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'a,b\r1,"x\ry"\r2,z')
    assert rows_of(tmp_path / "a.csv") == [
        Row({"a": "1", "b": "x\ry"}, "a.csv:2"),
        Row({"a": "2", "b": "z"}, "a.csv:4"),
    ]


def test_csv_damage_far_from_the_beginning(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"a,b\n" + b"1,\xc3\xa9\n" * 30_000 + b"2,\xc3\n" + b"3,4\n")
    problems = Problems()
    rows = list(read(tmp_path / "a.csv", problems))
    assert 0 < len(rows) <= 30_000
    assert [(p.where, p.what) for p in problems.items] == [("a.csv:30002", "not UTF-8: byte 3 of the line is 0xc3")]


def test_parquet_in_pieces(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    values = [{"n": n, "text": f"é{n}" * (n % 9)} for n in range(1000)]
    parquet.write_table(pyarrow.Table.from_pylist(values), tmp_path / "a.parquet", row_group_size=300)
    assert rows_of(tmp_path / "a.parquet") == [Row(v, f"a.parquet:row {i}") for i, v in enumerate(values, 1)]


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    values = [{"messages": [{"role": "user", "content": "é"}]}, {"messages": None}]
    parquet.write_table(pyarrow.Table.from_pylist(values), tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet") == [Row(v, f"a.parquet:row {i}") for i, v in enumerate(values, 1)]
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    assert "not a whole Parquet file" in problems_of(tmp_path / "b.parquet")[0]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": }\n', "a.jsonl:2: broken JSON: expecting value at column 7"),
        ("a.jsonl", b'{"a": 1}\n{"a": "x', "a.jsonl:2: broken JSON: unterminated string starting at col"),
        ("a.jsonl", b"\n[1]\n", "a.jsonl:2: the row is a list, not an object"),
        ("a.jsonl", b'"x"', "a.jsonl:1: the row is a string, not an object"),
        ("a.jsonl", b'{"a": NaN}', "a.jsonl:1: NaN is not a JSON value"),
        ("a.jsonl", b'{"a": -Infinity}', "a.jsonl:1: -Infinity is not a JSON value"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}', "a.jsonl:2: not UTF-8: byte 8 of the line is 0xff"),
        ("a.jsonl", b'{"a": ' + b"[" * 100_000, "a.jsonl:1: broken JSON: nested too deeply"),
        ("a.jsonl", b'{"a": ' + b"1" * 5000 + b"}", "a.jsonl:1: exceeds the limit (4300 digits)"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), "is UTF-16, not UTF-8"),
        ("a.jsonl", b"", "the file is empty: it has no rows"),
        ("a.jsonl", b"\n \n", "the file is empty: it has no rows"),
        ("a.json", b"", "the file is empty"),
        ("a.json", b"[]", "the file is empty"),
        ("a.json", b"{}", "the file is an object, not a list of rows"),
        ("a.json", b'[{"a": 1},\n{"a" 2}]', "a.json:2: broken JSON: expecting ':' delimiter at column 6"),
        ("a.json", b'{"a": 1}\n{"a": 2}', "a.json:2: broken JSON: extra data at column 1"),
        ("a.json", b'[{"a": 1}, 7]', "a.json:row 2: the row is a number, not an object"),
        ("a.json", b'[{"a": 1}, {"a": [NaN]}]', "a.json:row 2: NaN is not a JSON value"),
        ("a.json", b'[\n"\xe9"]', "a.json:2: not UTF-8: byte 2 of the line is 0xe9"),
        ("a.json", b"[" * 100_000, "broken JSON: nested too deeply"),
        ("a.csv", b"", "the file is empty"),
        ("a.csv", b"a,b\n", "the file is empty"),
        ("a.csv", b"a,b,a\n1,2,3\n", "a.csv:1: the header names 'a' twice"),
        ("a.csv", b"a;b\n1;2\n", "a.csv:1: the header has one column"),
        ("a.csv", b'a,b\n"1\n2",2\n1\n', "a.csv:4: the row has 1 cell, the header has 2"),
        ("a.csv", b'a,b\n1,"2\n3\n', "a.csv:2: broken CSV: unexpected end of data"),
        ("a.csv", b'a,b\n1,"2"x\n', "a.csv:2: broken CSV"),
        ("a.csv", b"a,b\n1,2\n\xff,2\n", "a.csv:3: not UTF-8: byte 1 of the line is 0xff"),
        ("a.parquet", b"", "the file is empty"),
        ("a.parquet", b"PAR1", "not a whole Parquet file"),
        ("a.txt", b"x", "`.txt` is not a kind of file that is read"),
    ],
)
def test_damage_is_named_with_its_place(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    found = problems_of(file)
    assert len(found) == 1
    assert expected in found[0]


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    assert "no such file" in problems_of(tmp_path / "none.jsonl")[0]
    (tmp_path / "folder.jsonl").mkdir()
    assert "is a folder" in problems_of(tmp_path / "folder.jsonl")[0]


def test_reading_goes_on_after_a_problem_and_all_of_them_become_one_error(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join('{"a": }\n' if n % 2 else '{"a": 1}\n' for n in range(60)))
    problems = Problems()
    assert len(list(read(file, problems))) == 30
    with pytest.raises(InputError) as error:
        problems.raise_any()
    text = str(error.value)
    assert text.startswith("30 problems in the data\na.jsonl:2: broken JSON")
    assert text.count("broken JSON") == 20
    assert "and 10 more problems" in text


def test_problems_sort_by_file_and_line() -> None:
    problems = Problems()
    for where in ("b.jsonl:10", "b.jsonl:9", "a.json:row 12", "b.jsonl:1", "a.json:row 3"):
        problems.add(where, "", "")
    problems.sort()
    assert [p.where for p in problems.items] == [
        "b.jsonl:1",
        "b.jsonl:9",
        "b.jsonl:10",
        "a.json:row 3",
        "a.json:row 12",
    ]


def test_files_of_one_name_are_told_apart() -> None:
    assert names([Path("x/a.csv"), Path("x/a.csv")]) == ["a.csv", "a.csv"]
    assert names([Path("x/a.csv"), Path("y/a.csv"), Path("b.csv")]) == ["x/a.csv", "y/a.csv", "b.csv"]


@settings(max_examples=60, deadline=None)
@given(rows=ROWS)
def test_json_and_jsonl_give_back_what_was_written(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    folder = tmp_path_factory.mktemp("rows")
    for ascii_only in (True, False):
        (folder / "a.jsonl").write_bytes(
            b"".join(json.dumps(row, ensure_ascii=ascii_only).encode() + b"\r\n" for row in rows)
        )
        assert [row.values for row in rows_of(folder / "a.jsonl")] == rows
    (folder / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    assert [row.values for row in rows_of(folder / "a.json")] == rows


@settings(max_examples=60, deadline=None)
@given(cells=st.lists(st.tuples(TEXT.filter(bool), TEXT), min_size=1, max_size=5))
def test_csv_gives_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[str, str]]
) -> None:
    file = tmp_path_factory.mktemp("csv") / "a.csv"
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, quoting=csv.QUOTE_ALL)
        writer.writerows([("a", "b"), *cells])
    assert [(row.values["a"], row.values["b"]) for row in rows_of(file)] == cells


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=80), suffix=st.sampled_from(["jsonl", "json", "csv", "parquet"]))
def test_any_bytes_are_rows_or_problems(tmp_path_factory: pytest.TempPathFactory, data: bytes, suffix: str) -> None:
    file = tmp_path_factory.mktemp("bytes") / f"a.{suffix}"
    file.write_bytes(data)
    problems = Problems()
    rows = list(read(file, problems))
    assert rows or problems.count
