"""What a request may ask for, and what is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from edgetune.serve.schema import ApiError, ChatRequest

USER = [{"role": "user", "content": "hello"}]


def parse(**more: Any) -> ChatRequest:
    return ChatRequest.parse(json.dumps({"model": "m", "messages": USER, **more}).encode())


def refused(**more: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        request = parse(**more)
        request.conversation()
        request.options()
    assert caught.value.status == 400
    assert caught.value.body()["error"]["type"] == "invalid_request_error"
    return caught.value


def content(value: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": value}]


def test_options_reach_the_model() -> None:
    options = parse(max_tokens=7, temperature=0.5, top_p=0.9, top_k=3, seed=5, stop=["a", "b"]).options()
    assert (options.max_tokens, options.temperature, options.top_p, options.top_k) == (7, 0.5, 0.9, 3)
    assert options.seed == 5
    assert list(options.stop) == ["a", "b"]


def test_a_single_stop_and_the_newer_limit() -> None:
    options = parse(max_completion_tokens=9, stop="end").options()
    assert options.max_tokens == 9
    assert list(options.stop) == ["end"]


def test_whole_numbers_are_numbers() -> None:
    assert parse(temperature=1, top_p=1).options().temperature == 1


@pytest.mark.parametrize(
    "harmless",
    [
        {"user": "me"},
        {"metadata": {"a": "b"}},
        {"store": True},
        {"service_tier": "auto"},
        {"n": 1},
        {"tools": []},
        {"tools": None},
        {"tool_choice": "none"},
        {"logprobs": False},
        {"top_logprobs": None},
        {"frequency_penalty": 0.0},
        {"logit_bias": {}},
        {"modalities": ["text"]},
        {"audio": None},
        {"whatever": None},
        {"temperature": None},
        {"stop": None},
        {"stop": []},
        {"seed": None},
        {"response_format": {"type": "text"}},
        {"stream_options": None},
    ],
)
def test_harmless(harmless: dict[str, Any]) -> None:
    assert parse(**harmless).options() == parse().options()


@pytest.mark.parametrize(
    ("unsupported", "param"),
    [
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"presence_penalty": -1}, "presence_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"functions": [{}]}, "functions"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"prediction": {}}, "prediction"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"temprature": 1}, "temprature"),
    ],
)
def test_unsupported_is_refused_by_name(unsupported: dict[str, Any], param: str) -> None:
    assert refused(**unsupported).param == param


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_p": 0}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**31}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"seed": "x"}, "seed"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"top_k": -1}, "top_k"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop": {}}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": "json"}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": None}, "messages"),
        ({"model": None}, "model"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": content(5)}, "messages[0].content"),
        ({"messages": content([])}, "messages[0].content"),
        ({"messages": content(["x"])}, "messages[0].content[0].type"),
        ({"messages": content([{"type": "text"}])}, "messages[0].content[0].text"),
        (
            {"messages": content([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}])},
            "messages[0].content[1].type",
        ),
        ({"messages": content([{"type": "input_audio", "input_audio": {}}])}, "messages[0].content[0].type"),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]},
            "messages[0].tool_calls",
        ),
        ({"messages": [{"role": "user", "content": "x", "name": "Ann"}]}, "messages[0].name"),
    ],
)
def test_wrong_is_refused_by_name(wrong: dict[str, Any], param: str) -> None:
    assert refused(**wrong).param == param


def test_missing_fields() -> None:
    for body, param in ((b"{}", "model"), (b'{"model": "m"}', "messages")):
        with pytest.raises(ApiError) as caught:
            ChatRequest.parse(body)
        assert (caught.value.param, caught.value.code) == (param, "missing_required_parameter")


def test_text_parts_are_joined_and_developer_is_system() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    request = parse(messages=[{"role": "developer", "content": "be short"}, {"role": "user", "content": parts}])
    assert request.conversation() == [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "one two"},
    ]


def test_an_answer_can_be_sent_back() -> None:
    turn = {
        "role": "assistant",
        "content": "hi",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "tool_calls": None,
    }
    assert parse(messages=[*USER, turn, *USER]).conversation()[1] == {"role": "assistant", "content": "hi"}


def test_json_schema() -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    given = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema, "strict": True}}
    assert json.loads(json.dumps(parse(response_format=given).options().json_schema)) is not None
    assert parse(response_format={"type": "json_object"}).options().json_schema is not None


def test_a_lone_surrogate_is_no_text() -> None:
    with pytest.raises(ApiError):
        ChatRequest.parse(b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}')
