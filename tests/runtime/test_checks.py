"""Junk in every public argument: an InputError that names it, and never anything else."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifacts import tiny_artifact  # noqa: F401 - a fixture
from edgetune import runtime
from edgetune.errors import EdgetuneError, InputError
from edgetune.runtime import checks
from edgetune.runtime.options import GenerationOptions, options_of
from edgetune.runtime.plain.encoder import Embedder
from edgetune.runtime.plain.heads import Answerer, Classifier, Tagger
from edgetune.runtime.plain.seq2seq import Seq2Seq
from edgetune.runtime.session import Session
from plain_models import Plain, plain  # noqa: F401 - a fixture

HUGE = 10**400
UNWRITABLE = 10**5000  # repr() refuses it
CIRCLE: dict[str, Any] = {}
CIRCLE["properties"] = CIRCLE
ASK: Any = [{"role": "user", "content": "Hi."}]
NO_TEXT: list[Any] = [None, 5, b"abc", [], True, "a\0b", "\ud800"]
NO_EVENT: list[Any] = [5, "x", True, object()]
NO_TEXTS: list[Any] = [None, 5, "late", b"x", {}, [None], [5], [b"x"], ["a\0"], ["\ud800"], [["a"]], [("a", 5)]]


@pytest.fixture(scope="module")
def session(tiny_artifact: Path) -> Iterator[Session]:  # noqa: F811
    with runtime.load(tiny_artifact) as found:
        yield found


junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(),
    st.lists(st.one_of(st.integers(), st.text(), st.none()), max_size=3),
    st.dictionaries(st.one_of(st.integers(), st.text()), st.one_of(st.floats(), st.text()), max_size=3),
    st.sampled_from([HUGE, -HUGE, UNWRITABLE, object(), np.array([1, 2]), np.float32("nan"), "\ud800", "\0", CIRCLE]),
)


@given(st.sampled_from(sorted(GenerationOptions.__annotations__)), junk)
def test_an_option_is_taken_or_refused_by_name(name: str, value: Any) -> None:
    try:
        GenerationOptions(**{name: value})
    except InputError as error:
        assert error.where == name
        assert len(error.what) < 300


@given(junk)
def test_options_are_options(value: Any) -> None:
    if value is None:
        assert options_of(None, {}) == GenerationOptions()
    else:
        with pytest.raises(InputError, match="options: must be GenerationOptions"):
            options_of(value, {})


@pytest.mark.parametrize("name", ["regex", "grammar", "stop", "adapter"])
@pytest.mark.parametrize("text", ["[a-z]+\0[0-9]+", "\0", "a\ud800"])
def test_text_that_the_native_side_would_cut_is_refused(name: str, text: str) -> None:
    with pytest.raises(InputError) as caught:
        GenerationOptions(**{name: [text] if name == "stop" else text})  # type: ignore[arg-type]
    assert caught.value.where == name


@pytest.mark.parametrize("schema", [{"type": object()}, {"const": math.nan}, {"const": UNWRITABLE}, CIRCLE, {(1,): 2}])
def test_a_schema_must_be_json(schema: Any) -> None:
    with pytest.raises(InputError, match="json_schema: cannot be written as JSON"):
        GenerationOptions(json_schema=schema)


def test_numbers_of_numpy_are_numbers() -> None:
    found = GenerationOptions(
        max_tokens=np.int64(3),  # type: ignore[arg-type]
        temperature=np.float32(0.5),  # type: ignore[arg-type]
        top_p=np.float16(0.5),  # type: ignore[arg-type]
        top_k=np.uint8(7),  # type: ignore[arg-type]
        seed=np.int32(5),  # type: ignore[arg-type]
        logit_bias={np.int64(4): np.float32(1.5)},  # type: ignore[dict-item]
        stop=None,  # type: ignore[arg-type]
    )
    assert found == GenerationOptions(
        max_tokens=3, temperature=0.5, top_p=0.5, top_k=7, seed=5, logit_bias={4: 1.5}, stop=()
    )
    assert [type(value) for value in (found.max_tokens, found.temperature, *found.logit_bias)] == [int, float, int]


@pytest.mark.parametrize(
    ("where", "value"),
    [
        *(("prompt", value) for value in (None, 5, b"abc", ASK[0], np.array(5), "a\0b", "\ud800")),
        *(("message 1", [value]) for value in (None, 5, b"abc", "text", np.int64(1), ["role"])),
        ("message 1.tool_calls", [{**ASK[0], "tool_calls": 5}]),
        ("message 1.tool_calls", [{**ASK[0], "tool_calls": {"function": {}}}]),
        ("message 1.tool_calls[0]", [{**ASK[0], "tool_calls": [5]}]),
        (
            "message 1.tool_calls[0]",
            [{**ASK[0], "tool_calls": [{"function": {"name": "f", "arguments": "[" * 99_999}}]}],
        ),
        ("message 2.role", [*ASK, {"role": "user\0", "content": "x"}]),
        ("message 2.content", [*ASK, {"role": "user", "content": "a\0"}]),
    ],
)
def test_prompts(session: Session, where: str, value: Any) -> None:
    for call in (session.generate, session.stream, session.read, session.render):
        with pytest.raises(InputError) as caught:
            call(value)  # type: ignore[operator]
        assert (caught.value.where or "").removeprefix("messages") == where or caught.value.where in ("messages", where)


@pytest.mark.parametrize(
    ("where", "given"),
    [
        *(("cancel", {"cancel": value}) for value in NO_EVENT),
        *(("on_prefill", {"on_prefill": value}) for value in (5, "x", [])),
        *(("options", {"options": value}) for value in (5, "x", {}, {"max_tokens": 3}, GenerationOptions)),
        *(("tools", {"tools": value}) for value in (5, "x", None, {})),
        ("adapter", {"adapter": 5}),
        ("logit_bias", {"logit_bias": {UNWRITABLE: 1}}),
    ],
)
def test_arguments_of_generations(session: Session, where: str, given: Any) -> None:
    calls: list[Any] = [session.generate, session.stream]
    calls += [session.read] if where in ("cancel", "adapter", "tools") else []
    for call in calls:
        with pytest.raises(InputError) as caught:
            call(ASK, **given)
        assert caught.value.where == where


@pytest.mark.parametrize(
    "ids", [None, 5, "x", b"x", [None], ["x"], [1.5], [True], [-1], [10**30], [UNWRITABLE], {1: 2}]
)
def test_ids(session: Session, ids: Any) -> None:
    with pytest.raises(InputError, match=r"^ids"):
        session.decode(ids)


@pytest.mark.parametrize("text", NO_TEXT)
def test_texts(session: Session, text: Any) -> None:
    with pytest.raises(InputError, match=r"^text: "):
        session.encode(text)


def test_what_is_right_is_taken(session: Session) -> None:
    ids = session.encode("One two.")
    assert session.decode(np.array(ids)) == session.decode(iter(ids)) == "One two."  # type: ignore[arg-type]
    assert session.generate(iter(ASK), max_tokens=np.int64(2)).completion_tokens == 2  # type: ignore[arg-type]
    assert session.generate(ASK, top_k=HUGE, temperature=1, max_tokens=2).completion_tokens == 2
    assert session.generate(ASK, json_schema={"const": "a\0b"}, max_tokens=30).fits is not None


@pytest.mark.parametrize(
    ("where", "given"),
    [
        *(("path", {"path": value}) for value in (None, 5, b"x", ["x"])),
        *(("threads", {"threads": value}) for value in ("2", 1.5, True, math.nan, HUGE, UNWRITABLE, [])),
        *(("kind", {"kind": value}) for value in (5, "x", [])),
        *(("use_profile", {"use_profile": value}) for value in (5, "x", None)),
    ],
)
def test_arguments_of_load(tiny_artifact: Path, where: str, given: Any) -> None:  # noqa: F811
    with pytest.raises(InputError) as caught:
        runtime.load(**{"path": tiny_artifact, **given})
    assert caught.value.where == where


@pytest.mark.parametrize("path", ["x" * 5000, "\0", "\ud800", ""])
def test_paths_that_cannot_be(path: str) -> None:
    with pytest.raises(InputError):
        runtime.load(path)


def _refused(call: Any, where: str, *given: Any, **named: Any) -> None:
    with pytest.raises(InputError) as caught:
        call(*given, **named)
    assert (caught.value.where or "").startswith(where), caught.value


def test_arguments_of_encoders(plain: Plain) -> None:  # noqa: F811
    with runtime.load(plain("embed")[1], kind=Embedder) as embedder:
        for texts in [*NO_TEXTS, [("a", "b")]]:
            _refused(embedder.encode, "texts", texts)
        for texts in (None, [None], "late"):
            _refused(embedder.windows, "texts", texts)
        _refused(embedder.count, "texts", 5)
        for value in NO_EVENT:
            _refused(embedder.encode, "cancel", ["late"], cancel=value)
        for value in (None, 5, "cut", np.array([1, 2])):
            _refused(embedder.encode, "long", ["late"], long=value)
        _refused(embedder.encode, "normalize", ["late"], normalize="x")
        assert embedder.encode(iter(["late", "open"])).shape == (2, 64)  # type: ignore[arg-type]
    with pytest.raises(EdgetuneError, match="the session is closed") as closed:
        embedder.encode(["late"])
    assert closed.value.fix


@pytest.mark.parametrize(("name", "kind"), [("classify", Classifier), ("tag", Tagger)])
def test_arguments_of_labels(plain: Plain, name: str, kind: Any) -> None:  # noqa: F811
    with runtime.load(plain(name)[1], kind=kind) as model:
        call = getattr(model, name)
        for texts in NO_TEXTS:
            _refused(call, "texts", texts)
        _refused(call, "cancel", ["late"], cancel=5)
        if name == "classify":
            assert call([["late", "open"]]) == call([("late", "open")])


def test_arguments_of_answers(plain: Plain) -> None:  # noqa: F811
    with runtime.load(plain("answer")[1], kind=Answerer) as model:
        for text in NO_TEXT:
            _refused(model.answer, "question", text, "Maria lives in Berlin")
            _refused(model.answer, "context", "where is Maria", text)
        for most in (0, None, "3", 1.5, True):
            _refused(model.answer, "max_tokens", "where", "Berlin", max_tokens=most)
        _refused(model.answer, "cancel", "where", "Berlin", cancel=True)


def test_arguments_of_sequence_to_sequence_models(plain: Plain) -> None:  # noqa: F811
    with runtime.load(plain("t5")[1], kind=Seq2Seq) as model:
        for text in [*NO_TEXT, ASK]:
            for call in (model.generate, model.stream, model.encode):
                _refused(call, "text", text)
        for value in NO_EVENT:
            _refused(model.stream, "cancel", "late", cancel=value)
        _refused(model.stream, "options", "late", {"max_tokens": 3})
        _refused(model.logits, "ids", None, [])
        _refused(model.logits, "answer", model.encode("late"), [10**30])
        with pytest.raises(InputError, match="speculation cannot be followed"):
            model.stream("late", speculation="on")
        assert model.generate("late", speculation="off", max_tokens=1).completion_tokens == 1


def test_values_in_messages_are_short() -> None:
    assert checks.shown("x" * 999).endswith("…") and len(checks.shown(HUGE)) < 70
    assert checks.shown(UNWRITABLE) == "a number of 16,610 bits"
