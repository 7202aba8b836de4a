"""Prefix reuse: what is read again, and that the answer does not show it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from artifacts import MAX_LENGTH, tiny_artifact  # noqa: F401
from edgetune import runtime
from edgetune.runtime.options import GenerationOptions
from edgetune.runtime.session import Completion, Session

SIZE = 64  # Artifact.prefill_tokens of the tiny artifact
SYSTEM = {"role": "system", "content": "You answer in one short sentence, please. " * 3}
SHORT = GenerationOptions(max_tokens=12, logprobs=3)


@pytest.fixture
def session(tiny_artifact: Path) -> Iterator[Session]:  # noqa: F811
    with runtime.load(tiny_artifact) as found:
        yield found


@pytest.fixture(scope="module")
def other(tiny_artifact: Path) -> Iterator[Session]:  # noqa: F811
    with runtime.load(tiny_artifact) as found:
        yield found


def whole(ids: list[int]) -> int:
    """Tokens of the whole pieces that a prompt begins with: one ends at its most tokens, or with a turn when it is not short."""
    start = 0
    for end in range(1, len(ids) + 1):
        if end - start == SIZE or (end - start >= SIZE // 4 and ids[end - 1] == 2):
            start = end
    return start


def system_tokens(session: Session) -> int:
    """What is known of a conversation under SYSTEM after another one: all of it, and it is more than a piece."""
    found = whole(session.encode(session.render([SYSTEM])))  # type: ignore[list-item]
    assert found > SIZE
    return found


def same(one: Completion, two: Completion) -> bool:
    """Bit for bit."""
    return (one.ids, one.text, one.logprobs) == (two.ids, two.text, two.logprobs)


def fresh(other: Session, prompt: Any, options: GenerationOptions = SHORT) -> Completion:
    """The answer of a session that knows nothing."""
    other.forget()
    return other.generate(prompt, options)


def test_a_conversation_reads_what_is_new(session: Session, other: Session) -> None:
    """From its second turn on, whatever the answers' limit: all whole pieces of the prompt before are known."""
    messages: list[Any] = [SYSTEM]
    before: list[int] = []
    for turn in ("Hi.", "And you?", "Why so?"):
        messages.append({"role": "user", "content": turn})
        answer = session.generate(messages, GenerationOptions(max_tokens=12 if before else None, logprobs=3))
        if before:
            assert same(answer, fresh(other, messages))
        assert answer.cached_tokens == whole(before)
        before = session.encode(session.render(messages))
        messages.append({"role": "assistant", "content": answer.text[:20]})


def test_another_conversation_reuses_the_system_prompt(session: Session, other: Session) -> None:
    known = []
    for turn in ("Hi.", "Words of another kind.", "So."):
        prompt: Any = [SYSTEM, {"role": "user", "content": turn}]
        answer = session.generate(prompt, SHORT)
        assert same(answer, fresh(other, prompt))
        known.append(answer.cached_tokens)
    assert known == [0, *2 * [system_tokens(session)]]


@pytest.mark.parametrize("length", [SIZE - 1, SIZE, SIZE + 1, 2 * SIZE, 2 * SIZE + 1])
def test_borders(session: Session, other: Session, length: int) -> None:
    ids = session.encode("One two three four five six seven. " * 20)
    prompt = session.decode(ids[:length])
    assert len(session.encode(prompt)) == length
    for _ in range(2):
        answer = session.generate(prompt, SHORT)
        assert same(answer, fresh(other, prompt))
    assert answer.cached_tokens == (length - 1) // SIZE * SIZE
    shorter = session.decode(ids[: length - 5])
    assert same(session.generate(shorter, SHORT), fresh(other, shorter))


def test_fast_knows_the_answer_too(session: Session) -> None:
    prompt = session.render([{"role": "user", "content": "Hi."}])
    options = GenerationOptions(max_tokens=20, reuse="fast")
    first = session.generate(prompt, options)
    ids = [*session.encode(prompt), *first.ids]
    for cut in range(len(ids), 0, -1):  # the longest text of whole characters
        text = session.decode(ids[:cut])
        if session.encode(text) == ids[:cut]:
            break
    again = session.generate(prompt, options)
    assert again.cached_tokens == first.prompt_tokens - 1 and again.ids == first.ids
    off = session.generate(prompt, GenerationOptions(max_tokens=20, reuse="off"))
    assert off.cached_tokens == 0 and off.ids == first.ids


def test_fast_does_not_spoil_exact(session: Session, other: Session) -> None:
    prompt = "One two three four five six seven. " * 6
    session.generate(prompt, GenerationOptions(max_tokens=5, reuse="fast"))
    session.generate(prompt + "Eight.", GenerationOptions(max_tokens=5, reuse="fast"))
    long = prompt + "Eight. Nine. Ten. Eleven. Twelve. Thirteen."
    assert same(session.generate(long, SHORT), fresh(other, long))


def test_after_a_cancel_and_a_closed_stream(session: Session, other: Session) -> None:
    prompt: Any = [SYSTEM, {"role": "user", "content": "Hi."}]
    cancel = threading.Event()
    cut = session.generate(prompt, SHORT, cancel, on_prefill=lambda done, total: cancel.set())
    assert (cut.finish_reason, cut.ids) == ("cancelled", ())
    answer = session.generate(prompt, SHORT)
    assert answer.cached_tokens == SIZE and same(answer, fresh(other, prompt))
    with closing(session.stream(prompt, SHORT)) as stream:
        next(stream)
        next(stream)
    assert same(session.generate(prompt, SHORT), answer)
    session.forget()
    assert session.generate(prompt, SHORT).cached_tokens == 0


def test_cancelled_at_any_token(session: Session, other: Session) -> None:
    prompt: Any = [SYSTEM, {"role": "user", "content": "Hi."}]
    whole = fresh(other, prompt)
    for reuse in ("exact", "fast"):
        for at in range(1, 6):
            cancel = threading.Event()
            options = GenerationOptions(max_tokens=12, temperature=1.0, seed=at, reuse=reuse)  # type: ignore[arg-type]
            ends = []
            for number, piece in enumerate(session.stream(prompt, options, cancel), 1):
                ends.append(piece.completion)
                if number == at:
                    cancel.set()
            assert ends[-1] is not None and ends[-1].completion_tokens == at
            assert same(session.generate(prompt, SHORT), whole)


def test_a_system_prompt_is_read_ahead(session: Session, other: Session) -> None:
    prompt: Any = [SYSTEM, {"role": "user", "content": "Hi."}]
    known = system_tokens(session)
    assert session.read([SYSTEM]) == known  # type: ignore[list-item]
    assert session.read("Hi.") == 0 and session.read([SYSTEM]) == known  # type: ignore[list-item]
    answer = session.generate(prompt, SHORT)
    assert answer.cached_tokens == known and same(answer, fresh(other, prompt))


def test_progress(session: Session) -> None:
    told: list[tuple[int, int]] = []
    prompt = "One two three four five six seven. " * 6
    total = session.generate(prompt, SHORT, on_prefill=lambda *n: told.append(n)).prompt_tokens
    assert told == [*((n, total) for n in range(SIZE, total, SIZE)), (total, total)]


def capacities(session: Session) -> list[int]:
    return [context.capacity for context in session._reader._kept]


def test_contexts_grow_where_memory_is_short(session: Session, other: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversation that outgrows its context gets one of twice the size, up to the whole."""
    monkeypatch.setattr("edgetune.runtime.prefix.available_memory", lambda: 0)
    text = "One two three four. "
    sizes = []
    for times in range(4, 40, 3):
        prompt = text * times
        if len(session.encode(prompt)) + 12 > MAX_LENGTH:
            break
        assert same(session.generate(prompt, SHORT), fresh(other, prompt))
        sizes += capacities(session)
    assert sizes[0] == 128 and sizes[-1] == MAX_LENGTH and len(set(sizes)) == 2


def test_a_conversation_has_room_for_later_turns(session: Session) -> None:
    assert session.read("One two three four five six seven. " * 5) == SIZE
    assert capacities(session) == [MAX_LENGTH]
    assert session.generate("One two three four five six seven. " * 7, SHORT).cached_tokens == SIZE


@pytest.mark.parametrize(
    "between", [{"regex": "[a-c]{2,4}"}, {"json_schema": {"type": "boolean"}}, {"prompt_logprobs": 1}]
)
def test_a_request_of_another_kind_leaves_the_conversation_alone(session: Session, between: dict[str, Any]) -> None:
    prompt: Any = [SYSTEM, {"role": "user", "content": "Hi."}]
    answer = session.generate(prompt, SHORT)
    options = GenerationOptions(max_tokens=20, **between)
    first = session.generate(prompt, options)
    again, known = session.generate(prompt, SHORT), whole(session.encode(session.render(prompt)))
    assert again.cached_tokens == known and same(again, answer)
    second = session.generate(prompt, options)
    assert second.ids == first.ids
    assert second.cached_tokens == (0 if "prompt_logprobs" in between else known)  # each constraint has its own


def test_few_contexts_are_kept(session: Session) -> None:
    for kind in ("a", "b", "c", "d"):
        session.generate("Hi", GenerationOptions(regex=kind))
    assert [context.key[0][1] for context in session._reader._kept] == ["b", "c", "d"]
    session._reader._model_bytes = 96 * session._reader._token_bytes  # room for one of 128 tokens
    session.generate("Hi", GenerationOptions(regex="e"))
    assert [context.key[0][1] for context in session._reader._kept] == ["e"]
    session.generate("Hi", GenerationOptions(reuse="off", max_tokens=5))
    assert capacities(session) == []  # it gave way, and what comes in its place is not kept


def test_an_error_forgets(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt: Any = [SYSTEM, {"role": "user", "content": "Hi."}]
    answer = session.generate(prompt, SHORT)

    def broken(*_: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr("edgetune.runtime.sampling.Sampler.scores", broken)
    with pytest.raises(Exception, match="no memory"):
        session.generate(prompt, SHORT)
    monkeypatch.undo()
    again = session.generate(prompt, SHORT)
    assert again.cached_tokens == 0 and same(again, answer)


# --- log-probabilities


def test_logprobs_are_those_of_the_trained_model(session: Session, tiny_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    prompt = session.render([SYSTEM, {"role": "user", "content": "Hi."}])  # type: ignore[list-item]
    answer = session.generate(prompt, GenerationOptions(max_tokens=8, logprobs=2, prompt_logprobs=3))
    assert answer.logprobs is not None and answer.prompt_logprobs is not None
    ids = [*session.encode(prompt), *answer.ids]
    with torch.no_grad():
        exact = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    found = [*answer.prompt_logprobs, *answer.logprobs]
    assert found[0] is None and len(found) == len(ids)
    for place, entry in enumerate(found[1:], 1):
        assert entry is not None and entry.id == ids[place]
        row = exact[place - 1]
        assert abs(entry.logprob - float(row[entry.id])) < 1e-4
        count = 3 if place < answer.prompt_tokens else 2
        assert [top.id for top in entry.top] == row.topk(count).indices.tolist()
        assert all(abs(top.logprob - float(row[top.id])) < 1e-4 for top in entry.top)


def test_pieces_carry_logprobs(session: Session) -> None:
    pieces = list(session.stream("Hi", GenerationOptions(max_tokens=6, temperature=1, seed=1, logprobs=0)))
    done = pieces[-1].completion
    assert done is not None and done.logprobs == tuple(entry for piece in pieces for entry in piece.logprobs)
    assert [entry.id for entry in done.logprobs] == list(done.ids)
    for entry in done.logprobs:
        assert entry.top == () and entry.logprob < 0
        assert entry.bytes is None or bytes(entry.bytes).decode("utf-8", "replace") == entry.text
    plain = session.generate("Hi", GenerationOptions(max_tokens=6, temperature=1, seed=1))
    assert plain.ids == done.ids and plain.logprobs is None


def test_bytes_of_tokens_are_the_text(session: Session) -> None:
    text = "naïve 東京 👋🏽\n\ttabs 12345"
    vocabulary = session._vocabulary
    ids = session.encode("<|im_start|>" + text)
    assert b"".join(vocabulary.bytes(token) or b"" for token in ids).decode() == text
    assert vocabulary.bytes(ids[0]) is None and vocabulary.text(ids[0]) == "<|im_start|>"
    assert vocabulary.bytes(10**6) is None
