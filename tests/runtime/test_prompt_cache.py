"""Prompts that are kept on disk: who takes them up answers as who read them, and what is damaged is read anew."""

from __future__ import annotations

import asyncio
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from artifacts import copy_of, seal, tiny_artifact  # noqa: F401
from edgetune import runtime
from edgetune.cli import app
from edgetune.errors import InputError
from edgetune.export.restore_graph import write_restore_graph
from edgetune.runtime import prompt_cache
from edgetune.runtime.options import GenerationOptions
from edgetune.runtime.session import Completion, Session

SYSTEM: Any = {"role": "system", "content": "You answer in one short sentence, please. " * 3}
KEEP = "--prompt-cache"
OPTIONS = GenerationOptions(max_tokens=12, logprobs=3)


def asked(words: str, system: Any = SYSTEM) -> list[Any]:
    return [system, {"role": "user", "content": words}]


@pytest.fixture(scope="module")
def artifact(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The tiny artifact with its second graph."""
    found = copy_of(tiny_artifact, tmp_path_factory.mktemp("restoring"))
    assert write_restore_graph(found, json.loads((found / "genai_config.json").read_text()))
    seal(found)
    return found


@pytest.fixture(scope="module")
def plain(artifact: Path) -> Any:
    with runtime.load(artifact) as session:
        yield session


def same(one: Completion, two: Completion) -> bool:
    """Bit for bit."""
    return (one.ids, one.text, one.logprobs) == (two.ids, two.text, two.logprobs)


def fresh(plain: Session, prompt: Any, **more: Any) -> Completion:
    plain.forget()
    return plain.generate(prompt, OPTIONS, **more)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def filled(artifact: Path, folder: Path) -> Path:
    """The file that a first session leaves."""
    with runtime.load(artifact, prompt_cache=folder) as session:
        session.generate(asked("Hi."), OPTIONS)
    (found,) = files(folder)
    return found


def test_another_process_takes_a_system_prompt_up(artifact: Path, plain: Session, tmp_path: Path) -> None:
    """Whatever the conversation after it is, its first answer included."""
    known = []
    for words in ("Hi.", "Words of another kind.", "Hi."):
        with runtime.load(artifact, prompt_cache=tmp_path) as session:
            answer = session.generate(asked(words), OPTIONS)
            known.append(answer.cached_tokens)
            assert same(answer, fresh(plain, asked(words)))
            turns = [*asked(words), {"role": "assistant", "content": "So."}, {"role": "user", "content": "And?"}]
            assert same(session.generate(turns, OPTIONS), fresh(plain, turns))
    assert known[0] == 0
    assert known[1] == known[2] > prompt_cache.LEAST_TOKENS
    (found,) = files(tmp_path)
    if os.name == "posix":
        assert stat.S_IMODE(found.stat().st_mode) == 0o600


def test_constraints_take_it_up(artifact: Path, plain: Session, tmp_path: Path) -> None:
    filled(artifact, tmp_path)
    with runtime.load(artifact, prompt_cache=tmp_path) as session:
        answer = session.generate(asked("Hi."), OPTIONS, regex="[a-z]{3}")
        assert answer.cached_tokens > 0
        assert same(answer, fresh(plain, asked("Hi."), regex="[a-z]{3}"))


def test_reading_ahead_is_kept(artifact: Path, plain: Session, tmp_path: Path) -> None:
    prompt = "All that is read ahead is kept, whatever it is. " * 5
    with runtime.load(artifact, prompt_cache=str(tmp_path)) as session:
        count = session.read(prompt)
    with runtime.load(artifact, prompt_cache=str(tmp_path)) as session:
        answer = session.generate(prompt, OPTIONS)
        assert 0 < answer.cached_tokens == (count if count < answer.prompt_tokens else 0)
        assert same(answer, fresh(plain, prompt))


def test_what_is_no_system_prompt_is_not_kept(artifact: Path, tmp_path: Path) -> None:
    with runtime.load(artifact, prompt_cache=tmp_path) as session:
        session.generate([{"role": "user", "content": "A long question. " * 10}], OPTIONS)
        session.generate("A long text. " * 10, OPTIONS)
        session.generate(asked("Hi.", {"role": "system", "content": "Short."}), OPTIONS)
    assert not files(tmp_path)


def test_reuse_off_reads_all(artifact: Path, plain: Session, tmp_path: Path) -> None:
    filled(artifact, tmp_path)
    with runtime.load(artifact, prompt_cache=tmp_path) as session:
        for more in ({"reuse": "off"}, {"prompt_logprobs": 1}):
            answer = session.generate(asked("Hi."), OPTIONS, **more)  # type: ignore[arg-type]
            assert answer.cached_tokens == 0
            assert same(answer, fresh(plain, asked("Hi.")))


def test_another_way_of_running_has_its_own(artifact: Path, tmp_path: Path) -> None:
    filled(artifact, tmp_path)
    with runtime.load(artifact, 1, prompt_cache=tmp_path) as session:
        assert session.generate(asked("Hi."), OPTIONS).cached_tokens == 0
    assert len(files(tmp_path)) == 2


@pytest.mark.parametrize("damage", ["data", "tokens", "cuts", "shape", "nested", "short", "empty", "noise", "length"])
def test_what_is_damaged_is_read_anew(
    artifact: Path, plain: Session, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = filled(artifact, tmp_path)
    data = bytearray(path.read_bytes())
    header = int.from_bytes(data[:8], "little")
    if damage == "data":
        data[-5] ^= 1
    elif damage in ("tokens", "cuts", "shape"):
        name = {"tokens": b"ids", "cuts": b"cuts", "shape": b"shape"}[damage]
        place = data.index(name) + data[data.index(name) :].index(b"[") + 1
        data[place] = ord("3") if data[place] != ord("3") else ord("4")
    elif damage == "length":
        data[7] = 0xFF
    elif damage == "nested":
        data[8 : 8 + header] = b"[" * header
    path.write_bytes({"short": data[: header + 100], "empty": b"", "noise": b"\xff" * 200}.get(damage, bytes(data)))
    with runtime.load(artifact, prompt_cache=tmp_path) as session:
        answer = session.generate(asked("Hi."), OPTIONS)
        assert answer.cached_tokens == 0
        assert same(answer, fresh(plain, asked("Hi.")))
    assert "is damaged, and read anew" in capsys.readouterr().err
    assert len(files(tmp_path)) == 1, "it is written again"
    with runtime.load(artifact, prompt_cache=tmp_path) as session:
        assert session.generate(asked("Hi."), OPTIONS).cached_tokens > 0


def test_a_folder_that_cannot_be_written(
    artifact: Path, plain: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Answers go on, it is said once, and not tried again."""
    (tmp_path / "file").write_text("")
    with runtime.load(artifact, prompt_cache=tmp_path / "file" / "below") as session:
        for words in ("Hi.", "So."):
            session.forget()
            assert same(session.generate(asked(words), OPTIONS), fresh(plain, asked(words)))
    assert capsys.readouterr().err.count("prompts are not kept") == 1


def test_a_full_disk(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise InputError("keeping a prompt needs about 1 MB of disk, 0 MB are free")

    monkeypatch.setattr(prompt_cache, "require_space", full)
    with runtime.load(artifact, prompt_cache=tmp_path) as session:
        assert session.generate(asked("Hi."), OPTIONS).ids
    assert not list(tmp_path.iterdir())


def test_files_that_were_not_used_for_longest_go(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = filled(artifact, tmp_path)
    monkeypatch.setattr(prompt_cache, "MOST_BYTES", int(2.5 * first.stat().st_size))
    others = [{"role": "system", "content": f"{word} " + SYSTEM["content"]} for word in ("One.", "Two.")]
    with runtime.load(artifact, prompt_cache=tmp_path) as session:
        session.generate(asked("Hi.", others[0]), OPTIONS)
        second = next(path for path in files(tmp_path) if path != first)
        os.utime(second, (1, 1))
        session.forget()
        assert session.generate(asked("So."), OPTIONS).cached_tokens > 0
        session.generate(asked("Hi.", others[1]), OPTIONS)
    assert first in files(tmp_path)
    assert second not in files(tmp_path)
    assert len(files(tmp_path)) == 2


def test_other_files_of_the_folder_are_left_alone(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of a model above all, which have the same ending; what a killed process left goes after an hour."""
    weights, old, new = (
        tmp_path / "model.safetensors",
        *(tmp_path / f".tmp-{'0' * 16}-{c * 24}.safetensors-1-a" for c in "ab"),
    )
    for path in (weights, old, new):
        path.write_bytes(b"\0" * 4096)
    for path in (weights, old):
        os.utime(path, (1, 1))
    monkeypatch.setattr(prompt_cache, "MOST_BYTES", 200_000)
    filled_in = [path for path in (weights, new) if path.exists()]
    with runtime.load(artifact, prompt_cache=tmp_path) as session:
        session.generate(asked("Hi."), OPTIONS)
    assert all(path.exists() for path in filled_in)
    assert not old.exists()
    assert len(files(tmp_path)) == 2


def test_a_file_larger_than_all_may_be_is_not_written(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = filled(artifact, tmp_path)
    monkeypatch.setattr(prompt_cache, "MOST_BYTES", first.stat().st_size // 2)
    with runtime.load(artifact, prompt_cache=tmp_path) as session:
        session.generate(asked("Hi.", {"role": "system", "content": "Two. " + SYSTEM["content"]}), OPTIONS)
    assert files(tmp_path) == [first]


def test_what_two_prompts_have_in_common_is_taken_up(artifact: Path, plain: Session, tmp_path: Path) -> None:
    """Whole pieces of it; a prompt that is wholly in the file, too."""
    long = "The same words, and then again the same words. " * 7
    with runtime.load(artifact, prompt_cache=tmp_path) as session:
        assert session.read(long) > 64
    for prompt in (long[:200] + "others", long):
        with runtime.load(artifact, prompt_cache=tmp_path) as session:
            answer = session.generate(prompt, OPTIONS)
            assert answer.cached_tokens > 0
            assert same(answer, fresh(plain, prompt))


def test_a_folder_that_can_only_be_read(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an image: what is there counts."""
    filled(artifact, tmp_path)

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "utime", refuse)
    with runtime.load(artifact, prompt_cache=tmp_path) as session:
        assert session.generate(asked("Hi."), OPTIONS).cached_tokens > 0
    assert files(tmp_path)


def test_a_file_that_cannot_be_read_is_left_alone(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    filled(artifact, tmp_path)

    def refuse(_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(prompt_cache, "_mapped", refuse)
    with runtime.load(artifact, prompt_cache=tmp_path) as session:
        assert session.generate(asked("Hi."), OPTIONS).cached_tokens == 0
    assert "cannot be read" in capsys.readouterr().err
    assert files(tmp_path)


def test_conversations_of_every_form(artifact: Path, plain: Session, tmp_path: Path) -> None:
    """What works without a prompt cache works with one."""
    call = {"id": "1", "type": "function", "function": {"name": "a", "arguments": "{}"}}
    turns: list[Any] = [
        SYSTEM,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "user", "content": "So?"},
    ]
    with runtime.load(artifact, prompt_cache=tmp_path) as session:
        for prompt in (turns, [], [SYSTEM], [SYSTEM, {"role": "assistant", "content": "Yes."}]):
            outcomes = []
            for one in (session, plain):
                try:
                    outcomes.append(one.generate(iter(prompt), max_tokens=4).ids)  # type: ignore[arg-type]
                except InputError as error:
                    outcomes.append(error.what)  # type: ignore[arg-type]
            assert outcomes[0] == outcomes[1]


def test_contexts_do_not_grow_where_nothing_outgrew_them(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two system prompts in turn, each taken up from disk, with little memory."""
    monkeypatch.setattr("edgetune.runtime.prefix.available_memory", lambda: 0)
    begun = {"role": "system", "content": SYSTEM["content"] + SYSTEM["content"][:40]}
    with runtime.load(artifact, prompt_cache=tmp_path) as session:
        sizes = []
        for turn in range(6):
            session.generate(asked("Hi.", (SYSTEM, begun)[turn % 2]), OPTIONS)
            sizes.append(session._reader._kept[-1].capacity)
    assert max(sizes) == sizes[1]


def test_an_artifact_without_the_graph(tiny_artifact: Path, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(InputError, match=r"has no restore\.onnx") as error:
        runtime.load(tiny_artifact, prompt_cache=tmp_path)
    assert error.value.fix


def test_what_is_no_folder(artifact: Path) -> None:
    for wrong in (3, "", "a\0b"):
        with pytest.raises(InputError, match="must be a folder, True or False, not"):
            runtime.load(artifact, prompt_cache=wrong)  # type: ignore[call-overload]


def test_a_service_keeps_what_its_clients_bring(artifact: Path, tmp_path: Path) -> None:
    from edgetune.serve.worker import Worker

    async def served(session: Session) -> int:
        queue = Worker(session, 4)
        answer = queue.submit(asked("Hi."), OPTIONS)
        assert [piece async for piece in answer]
        queue.stop()
        assert await asyncio.to_thread(queue.close, 5)
        assert answer.completion
        return answer.completion.cached_tokens

    for known in (False, True):
        with runtime.load(artifact, prompt_cache=tmp_path) as session:
            assert (asyncio.run(served(session)) > 0) == known


def test_the_command_line(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`generate` in two processes' stead: the second takes up what the first read, from edgetune's own folder."""
    monkeypatch.setenv("EDGETUNE_HOME", str(tmp_path))
    words = ["generate", str(artifact), "Hi.", "--system", SYSTEM["content"], "--max-tokens", "4", "--json"]
    found = [json.loads(CliRunner().invoke(app, [*words, *more]).stdout) for more in ([], [KEEP], [KEEP])]
    assert [one["cached_tokens"] > 0 for one in found] == [False, False, True]
    assert len({one["text"] for one in found}) == 1
    assert files(tmp_path / "prompts")
