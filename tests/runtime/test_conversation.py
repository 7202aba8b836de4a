"""Conversations on disk, what a person types, and what reaches the terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from conftest import write_jsonl
from edgetune.errors import InputError
from edgetune.runtime.conversation import Conversation
from edgetune.runtime.prompt import read_grammar, read_prompt, read_schema, read_system, read_tools
from edgetune.runtime.terminal import after_enter, piped_turns, printable, unquoted


def spoken(*texts: str, system: str | None = None) -> Conversation:
    found = Conversation(system)
    found.turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return found


def rows(path: Path) -> list[list[str]]:
    return [
        [m["content"] for m in json.loads(line)["messages"]]
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]
    ]


def test_saved_conversations_are_training_rows(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    assert spoken("Hi", "Hello", system="Be kind").save(file) == 1
    assert spoken("Grüße", "東京\n\u2028 next").save(file) == 2
    assert rows(file)[0] == ["Be kind", "Hi", "Hello"]
    lines = file.read_text(encoding="utf-8").split("\n")
    assert len(lines) == 3 and lines[2] == "" and "Grüße" in lines[1]
    assert json.loads(lines[0])["messages"][0] == {"role": "system", "content": "Be kind"}


def test_saving_again_updates_the_row(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    write_jsonl(file, [{"messages": [{"role": "user", "content": "other"}]}])
    talk = spoken("a", "b")
    assert [talk.save(file), talk.save(file)] == [2, 2]
    talk.turns += [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
    assert talk.save(file) == 2
    assert rows(file) == [["other"], ["a", "b", "c", "d"]]
    assert spoken("other", "talk").save(file) == 3
    assert talk.save(file) == 4  # its row is not the last any more: nothing of others is touched


def test_save_refuses(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to save"):
        Conversation("x").save(tmp_path / "a.jsonl")
    (tmp_path / "README.md").write_text("# Title\n")
    with pytest.raises(InputError, match=r"README.md:1: is not a JSON object"):
        spoken("a", "b").save(tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == "# Title\n"
    (tmp_path / "no-end.jsonl").write_text('{"a": 1}')
    assert spoken("a", "b").save(tmp_path / "no-end.jsonl") == 2


def test_load_goes_on_with_the_last(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    spoken("x", "y").save(file)
    spoken("a", "b", system="S").save(file)
    found = Conversation()
    found.load(file)
    assert (found.system, [m["content"] for m in found.messages]) == ("S", ["S", "a", "b"])
    own = Conversation("mine")
    own.load(file)
    assert own.system == "mine"


@pytest.mark.parametrize(("text", "what"), [
    ("", "is empty"),
    ("{", ":1: is not a JSON object"),
    ("[]\n", ":1: is not a JSON object"),
    ('{"text": "x"}', ":1: holds no messages"),
    ('{"messages": [{"role": "user"}]}', ":1: holds no messages"),
    ('{"messages": [{"role": "user", "content": "x"}]}', "end with an answer"),
    ('{"messages": []}', "end with an answer"),
    ('{"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "x"}]}', "end with an answer"),
])  # fmt: skip
def test_load_refuses(tmp_path: Path, text: str, what: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(InputError, match=what):
        Conversation().load(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="no such file"):
        Conversation().load(tmp_path / "b.jsonl")


def test_control_characters_do_not_reach_the_terminal() -> None:
    evil = "a\x1b[2J\x1b]0;title\x07b\r\x08\x7f\x9b31m\x00c\n\td 👩‍👩‍👧 é"
    assert printable(evil) == "a[2J]0;titleb31mc\n\td 👩‍👩‍👧 é"


def test_lines_that_go_on() -> None:
    assert after_enter("done") is None
    assert after_enter("more\\") == "more\n"
    assert after_enter('"""block') == '"""block\n'
    assert after_enter('"""block\\') == '"""block\\\n'
    assert after_enter('"""block"""') is None
    assert unquoted('"""\none\n\ntwo\n"""') == "one\n\ntwo"
    assert unquoted("  plain  ") == "plain"


def test_piped_turns() -> None:
    text = 'one\r\n\n   \ntwo\\\nmore\n"""\nthree\n\nlines\n"""\nlast'
    assert list(piped_turns(io.BytesIO(text.encode()))) == ["one", "two\nmore", "three\n\nlines", "last"]
    assert list(piped_turns(io.BytesIO(b'"""open'))) == ["open"]
    with pytest.raises(InputError, match="line 2: is not UTF-8"):
        list(piped_turns(io.BytesIO(b"ok\n\xff\n")))


def test_prompt_files(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_bytes(b"\xef\xbb\xbfline one\r\nline two\r\n")
    assert read_prompt(None, file) == "line one\r\nline two"
    assert read_prompt("as it is\n", None) == "as it is\n"
    for data, what in ((b" \n", "the prompt is empty"), (b"\xff\xfe", "is not UTF-8 text"), (b"a\0b", "NUL")):
        file.write_bytes(data)
        with pytest.raises(InputError, match=what):
            read_prompt(None, file)
    file.write_bytes(b"a" * (8 << 20) + b"b")
    with pytest.raises(InputError, match="more than 8 MiB"):
        read_prompt(None, file)


def test_schema_from_file_or_text(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text('{"type": "object"}')
    assert read_schema(str(tmp_path / "s.json")) == read_schema(' {"type": "object"}') == {"type": "object"}
    (tmp_path / "list.json").write_text("[]")
    for value, what in ((str(tmp_path / "list.json"), "is not a JSON object"), ("{nope", "is not JSON"),
                        (str(tmp_path / "x.json"), "no such file"), (str(tmp_path), "is a folder"), ("[]", "is not a JSON object"),
                        ("", "is empty")):  # fmt: skip
        with pytest.raises(InputError, match=what) as caught:
            read_schema(value)
        assert caught.value.where
    for read in (read_tools, read_grammar):
        with pytest.raises(InputError, match="is a folder"):
            read(str(tmp_path))
    with pytest.raises(InputError, match="must be a list"):
        read_tools("{}")


def test_a_system_prompt_is_a_file_or_the_text_itself(tmp_path: Path) -> None:
    (tmp_path / "rules.txt").write_text("You are brief.\n")
    assert read_system(str(tmp_path / "rules.txt")) == "You are brief."
    for text in ("You are brief.", "x" * 5000, "Two\nlines."):
        assert read_system(text) == text
    with pytest.raises(InputError, match="the prompt is empty"):
        read_system(" ")
