"""Constraints: JSON Schema, regular expressions, grammars. Answers fit, say that they were cut, or are errors."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from artifacts import tiny_artifact  # noqa: F401
from edgetune import runtime
from edgetune.errors import EdgetuneError, InputError
from edgetune.runtime.guidance import Guide
from edgetune.runtime.options import GenerationOptions
from edgetune.runtime.session import Session

ASK: Any = [{"role": "user", "content": "What is 2 plus 2?"}]
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "maximum": 999}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def session(tiny_artifact: Path) -> Iterator[Session]:  # noqa: F811
    with runtime.load(tiny_artifact) as found:
        yield found


def only(text: str) -> dict[str, Any]:
    """A schema with one answer."""
    said = {"type": "object", "properties": {"say": {"const": text}}, "required": ["say"]}
    return {**said, "additionalProperties": False}


def test_json_schema(session: Session) -> None:
    for seed in range(6):
        options = GenerationOptions(json_schema=SCHEMA, temperature=1.5, top_k=0, seed=seed, max_tokens=150)
        answer = session.generate(ASK, options)
        assert answer.finish_reason == "stop"
        found = json.loads(answer.text)
        assert found.keys() == {"n", "ok"}
        assert type(found["n"]) is int and found["n"] <= 999 and type(found["ok"]) is bool


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "objec"},
        {"type": "string", "pattern": "(("},
        {"$ref": "#/definitions/missing"},
        {"properties": []},
    ],
)
def test_broken_schema(session: Session, schema: Any) -> None:
    with pytest.raises(InputError, match="the schema cannot be followed") as caught:
        session.generate(ASK, GenerationOptions(json_schema=schema))
    assert caught.value.where == "json_schema"
    assert session.generate(ASK, GenerationOptions(max_tokens=2)).completion_tokens == 2


@pytest.mark.parametrize(
    "schema",
    [{"type": "array", "minItems": 10**9}, {"properties": {"a": {"anyOf": [{"type": "array", "maxItems": 1e9}]}}}],
)
def test_more_items_than_memory_holds_are_refused(session: Session, schema: Any) -> None:
    with pytest.raises(InputError, match=r"(min|max)Items is 1,000,000,000(\.0)?; items are counted up to 10,000"):
        session.generate("Hi", json_schema=schema)


def test_items_are_not_counted_in_data(session: Session) -> None:
    text = session.generate("Hi", json_schema={"enum": [{"minItems": 10**9}]}, max_tokens=40).text
    assert json.loads(text) == {"minItems": 10**9}


def test_schema_beyond_the_runtime_is_an_error(session: Session) -> None:
    with pytest.raises(EdgetuneError, match="leave emoji and other characters of several tokens out"):
        session.generate(ASK, GenerationOptions(json_schema=only("👋🏽")))
    assert session.generate(ASK, GenerationOptions(max_tokens=2)).completion_tokens == 2


def test_free_strings_are_json_or_an_error(session: Session) -> None:
    schema = {
        "type": "object",
        "properties": {"say": {"type": "string", "maxLength": 12}},
        "required": ["say"],
    }
    ends = set()
    for seed in range(30):
        options = GenerationOptions(
            json_schema={**schema, "additionalProperties": False}, temperature=2, top_k=0, seed=seed
        )
        try:
            answer = session.generate(ASK, options)
        except EdgetuneError as error:
            assert "its JSON is not whole" in str(error)
            ends.add("error")
        else:
            assert set(json.loads(answer.text)) == {"say"}
            ends.add(answer.finish_reason)
    assert "stop" in ends and "length" not in ends


def test_build_without_guidance_is_no_silent_success(
    tiny_artifact: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with runtime.load(tiny_artifact) as session:  # one that has not tried guidance yet
        real = session._reader._og

        class Params:  # takes guidance and forgets it, as such a build does
            def __new__(cls, model: Any) -> Any:
                class Deaf(real.GeneratorParams):  # type: ignore[misc,name-defined]
                    def set_guidance(self, *_: object) -> None:
                        pass

                return Deaf(model)

        class Module:
            GeneratorParams = Params
            Generator = real.Generator

        monkeypatch.setattr(session._reader, "_og", Module)
        with pytest.raises(EdgetuneError, match="cannot follow a JSON Schema"):
            session.generate(ASK, GenerationOptions(json_schema=SCHEMA))


@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize(
    ("constraint", "fits"),
    [
        ({"regex": "[a-c]{3,5}(x|yz)"}, r"[a-c]{3,5}(x|yz)"),
        ({"grammar": 'start: WORD ("-" WORD){1,2}\nWORD: /[a-e]+[0-9]/'}, r"[a-e]+\d(-[a-e]+\d){1,2}"),
    ],
)
def test_regex_and_grammar(session: Session, constraint: dict[str, str], fits: str, seed: int | None) -> None:
    drawn: Any = {} if seed is None else {"temperature": 1.5, "top_k": 8, "top_p": 0.9, "min_p": 0.01, "seed": seed}
    options = GenerationOptions(max_tokens=100, **constraint, **drawn)
    answer = session.generate(ASK, options)
    if answer.finish_reason == "length":  # a random model may repeat a letter for ever
        assert "grammar" in constraint
        options = GenerationOptions(max_tokens=100, **constraint, temperature=2, top_k=0, seed=3)
        answer = session.generate(ASK, options)
    assert answer.finish_reason == "stop"
    assert re.fullmatch(fits, answer.text)
    assert session.generate(ASK, options).ids == answer.ids  # the kept context begins the constraint anew


def test_draws_under_a_constraint_follow_the_model(session: Session) -> None:
    """Where the drawn token is not allowed, an allowed one is drawn by its probability, not the first one."""
    options = {"regex": "[a-z]", "temperature": 2.0, "top_k": 0}
    drawn = {session.generate(ASK, GenerationOptions(seed=seed, **options)).text for seed in range(20)}
    assert len(drawn) > 5
    narrow = {**options, "top_k": 1}  # what it keeps is not allowed: then the likeliest that is
    likeliest = session.generate(ASK, GenerationOptions(regex="[a-z]")).text
    assert {session.generate(ASK, GenerationOptions(seed=seed, **narrow)).text for seed in range(5)} == {likeliest}


@pytest.mark.parametrize("constraint", [{"regex": "(("}, {"grammar": "start: nope"}, {"regex": "(?<=a)b"}])
def test_broken_regex_and_grammar(session: Session, constraint: Any) -> None:
    with pytest.raises(InputError, match="cannot be followed") as caught:
        session.generate(ASK, GenerationOptions(**constraint))
    assert caught.value.where == next(iter(constraint))


def test_a_constraint_that_is_too_large_gets_its_own_cure(session: Session) -> None:
    with pytest.raises(EdgetuneError) as caught:
        session.generate(ASK, grammar='start: "a" start')
    assert "simpler" in str(caught.value.fix)


def test_constraints_that_nothing_answers(session: Session) -> None:
    with pytest.raises(EdgetuneError, match="leave emoji and other characters of several tokens out"):
        session.generate(ASK, GenerationOptions(regex="👋🏽"))
    answer = session.generate(ASK, GenerationOptions(regex="[a-c]{20}", max_tokens=5))
    assert (answer.finish_reason, answer.completion_tokens) == ("length", 5)


CONSTRAINTS: list[dict[str, Any]] = [
    {"json_schema": {"type": "string"}},
    {"regex": "[a-c]{20}"},
    {"grammar": "start: /[a-c]{20}/"},
]


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_what_was_cut_says_so(session: Session, constraint: Any) -> None:
    cut = session.generate(ASK, max_tokens=3, **constraint)
    assert (cut.finish_reason, cut.fits, cut.as_dict()["fits"]) == ("length", False, False)
    cancel = threading.Event()
    cancel.set()
    assert session.generate(ASK, None, cancel, **constraint).fits is not True
    whole = session.generate(ASK, regex="[a-c]{2}")
    assert (whole.finish_reason, whole.fits) == ("stop", True)
    plain = session.generate(ASK, max_tokens=3)
    assert plain.fits is None and "fits" not in plain.as_dict()


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_stop_strings_are_refused_beside_a_constraint(session: Session, constraint: Any) -> None:
    with pytest.raises(InputError, match="what is cut off would not fit") as caught:
        session.generate(ASK, stop=("}",), **constraint)
    assert caught.value.where == "stop" and caught.value.fix


@pytest.mark.parametrize("constraint", [{"grammar": "start: /[^a]{5}/"}, {"regex": r"\P{N}{5}"}])
def test_half_a_character_is_no_answer(session: Session, constraint: Any) -> None:
    """A token of half a character passes the native side, and would be left out of the text."""
    refused = 0
    for seed in range(150):
        try:
            answer = session.generate(ASK, seed=seed, temperature=2, top_k=0, max_tokens=60, **constraint)
        except EdgetuneError as error:
            refused += 1
            assert "broken character" in str(error)
            continue
        if answer.fits:
            assert len(answer.text) == 5, (seed, answer)
    assert refused


def test_how_schemas_are_followed_is_not_the_users_choice(session: Session) -> None:
    with pytest.raises(InputError, match="cannot be followed"):
        session.generate(ASK, json_schema={"x-guidance": {"lenient": True}, "not": {}})


def test_json_that_does_not_fit_its_schema_is_an_error(session: Session) -> None:
    """Whatever guidance let through."""
    guide = Guide.of(GenerationOptions(json_schema=SCHEMA))
    assert guide is not None
    guide.check('{"n": 3, "ok": true}', b'{"n": 3, "ok": true}', session.artifact)
    for text, what in (
        ('{"n": 1000, "ok": true}', "n is not from"),
        ('{"n": 3}', "lacks 'ok'"),
        ('{"n": 3,', "not whole"),
    ):
        with pytest.raises(EdgetuneError, match=what):
            guide.check(text, text.encode(), session.artifact)
