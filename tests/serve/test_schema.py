"""What a request may ask for, and what is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from edgetune.serve.error import ApiError
from edgetune.serve.schema import ChatRequest

USER = [{"role": "user", "content": "hello"}]


def parse(**more: Any) -> ChatRequest:
    return ChatRequest.parse(json.dumps({"model": "m", "messages": USER, **more}).encode())


def refused(**more: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        request = parse(**more)
        request.conversation()
        request.functions()
        request.options()
    assert caught.value.status == 400
    assert caught.value.body()["error"]["type"] == "invalid_request_error"
    return caught.value


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


def content(value: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": value}]


def test_options_reach_the_model() -> None:
    options = parse(max_tokens=7, temperature=0.5, top_p=0.9, top_k=3, seed=5, stop=["a", "b"]).options()
    assert (options.max_tokens, options.temperature, options.top_p, options.top_k) == (7, 0.5, 0.9, 3)
    assert options.seed == 5
    assert list(options.stop) == ["a", "b"]


def test_further_options_reach_the_model() -> None:
    given = {"min_p": 0.1, "repetition_penalty": 1.2, "presence_penalty": -1.0, "frequency_penalty": 0.5}
    options = parse(**given, logit_bias={"5": -100, "7": 2.5}, prompt_logprobs=2, cache_prompt=False).options()
    assert {name: getattr(options, name) for name in given} == given
    assert (options.logit_bias, options.prompt_logprobs, options.reuse) == ({5: -100, 7: 2.5}, 2, "off")
    assert (parse().options().logprobs, parse(logprobs=True).options().logprobs) == (None, 0)
    assert parse(logprobs=True, top_logprobs=4).options().logprobs == 4
    assert parse(structured_outputs={"regex": "a+"}).options().regex == "a+"
    assert parse(structured_outputs={"grammar": "start: A"}).options().grammar == "start: A"
    assert parse(structured_outputs={"json": {"type": "object"}}).options().json_schema == {"type": "object"}


def test_tools_reach_the_model() -> None:
    assert parse(tools=TOOLS).functions() == TOOLS and parse(tools=TOOLS).options() == parse().options()
    assert parse(tools=TOOLS, tool_choice="none").functions() == []
    for choice in ("required", {"type": "function", "function": {"name": "add"}}):
        request = parse(tools=TOOLS, tool_choice=choice)
        schema = request.options().json_schema
        assert request.functions() == TOOLS and schema is not None and schema["properties"]["name"] == {"const": "add"}


def test_calls_and_what_tools_said_go_back() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    turns = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": [{"type": "text", "text": "2"}], "tool_call_id": "c1"},
    ]
    assert parse(messages=[*USER, *turns]).conversation()[1:] == [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
    ]


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
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"functions": [{}]}, "functions"),
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
        ({"min_p": 2}, "min_p"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"presence_penalty": -2.5}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"stop": "}", "response_format": {"type": "json_object"}}, "stop"),
        ({"stop": "b", "structured_outputs": {"regex": "a+b"}}, "stop"),
        ({"structured_outputs": {"choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "grammar": "b"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": 1}}, "regex"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "subtract"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
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
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
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
            "messages[0].tool_calls[0].function",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a"}}]}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": 1}]}, "messages[0].tool_call_id"),
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
