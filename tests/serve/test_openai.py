"""The real client against a real artifact."""

# ruff: noqa: F811 - a fixture that is imported is also an argument
from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from serving import FakeSession, eventually, served

from artifacts import copy_of, seal, tiny_artifact, widen  # noqa: F401
from edgetune.runtime.artifact import open_artifact
from edgetune.runtime.options import GenerationOptions
from edgetune.runtime.session import Session


@pytest.fixture(scope="module")
def session(tiny_artifact: Path) -> Iterator[Session]:
    with Session(open_artifact(tiny_artifact)) as session:
        yield session


@pytest.fixture(scope="module")
def address(session: Session) -> Iterator[str]:
    with served(session, queue=8) as address:
        yield address


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def say(text: str) -> list[openai.types.chat.ChatCompletionMessageParam]:
    return [{"role": "user", "content": text}]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "edgetune"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_whole_answer_is_the_session_s(client: openai.OpenAI, session: Session) -> None:
    expected = session.generate([{"role": "user", "content": "hello"}], GenerationOptions(max_tokens=12))
    answer = client.chat.completions.create(model="tiny", messages=say("hello"), max_tokens=12)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == expected.prompt_tokens
    assert answer.usage.completion_tokens == expected.completion_tokens


def test_stream_is_the_whole_answer(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=say("hello"), max_completion_tokens=12)
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=say("hello"),
            max_completion_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == whole.choices[0].message.content
    assert sum(bool(text) for text in texts) > 3
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage


def test_seed_and_stop(client: openai.OpenAI) -> None:
    def sample(seed: int, stop: str | None = None) -> str:
        answer = client.chat.completions.create(
            model="tiny", messages=say("hello"), max_tokens=24, temperature=1.5, seed=seed, stop=stop
        )
        return answer.choices[0].message.content or ""

    first = sample(1)
    assert sample(1) == first
    assert len({sample(seed) for seed in range(1, 5)}) > 1
    middle = first[len(first) // 2]
    assert sample(1, stop=middle) == first.partition(middle)[0]


def test_json_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="tiny",
        messages=say("hello"),
        response_format={"type": "json_schema", "json_schema": {"name": "ok", "schema": schema}},
    )
    assert json.loads(answer.choices[0].message.content or "")["ok"] in (True, False)
    assert answer.choices[0].finish_reason == "stop"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="tiny",
            messages=say("hello"),
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "nonsense"}},
            },
        )
    assert caught.value.param == "response_format"


def test_a_system_prompt_of_the_service_is_read_ahead(session: Session) -> None:
    system = "You answer in one short sentence, please. " * 3
    session.forget()
    with served(session, system=system) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        asked: Any = {"model": "tiny", "max_tokens": 6}
        answer = client.chat.completions.create(messages=say("hello"), **asked)
        usage = answer.usage
        assert usage is not None and usage.prompt_tokens_details is not None
        assert usage.prompt_tokens_details.cached_tokens == session._reader.whole(
            session.encode(session.render([{"role": "system", "content": system}]))
        )
        same = client.chat.completions.create(messages=[{"role": "system", "content": system}, *say("hello")], **asked)
        assert same.choices[0].message.content == answer.choices[0].message.content
        other = client.chat.completions.create(
            messages=[{"role": "system", "content": "Short."}, *say("hello")], **asked
        )
        assert other.usage is not None and other.usage.prompt_tokens < usage.prompt_tokens


def test_logprobs(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": say("hello"), "max_tokens": 6, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**asked, extra_body={"prompt_logprobs": 1})
    found = whole.choices[0].logprobs
    assert found is not None and found.content is not None
    assert len(found.content) == 6 and all(len(entry.top_logprobs) == 2 for entry in found.content)
    assert all(entry.logprob == entry.top_logprobs[0].logprob < 0 for entry in found.content)  # greedy
    prompt = (whole.model_extra or {})["prompt_logprobs"]
    assert whole.usage is not None and len(prompt) == whole.usage.prompt_tokens and prompt[0] is None
    assert {type(entry["logprob"]) for entry in prompt[1].values()} == {float}
    streamed = [
        entry
        for chunk in client.chat.completions.create(**asked, stream=True)
        if chunk.choices and chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content or []
    ]
    assert streamed == found.content


def test_sampling_options(client: openai.OpenAI) -> None:
    def answer(**more: Any) -> str:
        done = client.chat.completions.create(model="tiny", messages=say("hello"), max_tokens=12, **more)
        return done.choices[0].message.content or ""

    assert answer(logit_bias={"50": 100}) == "P" * 12
    assert answer(logit_bias={"50": 100}, frequency_penalty=2) == "P" * 12
    assert re.fullmatch("[a-c]{4}", answer(extra_body={"structured_outputs": {"regex": "[a-c]{4}"}}))
    sampled = {"temperature": 1, "seed": 3, "extra_body": {"min_p": 0.9, "top_k": 0, "repetition_penalty": 1.1}}
    assert answer(**sampled) == answer(**sampled)
    with pytest.raises(openai.BadRequestError) as caught:
        answer(logit_bias={"384": 1})
    assert caught.value.param == "logit_bias"
    with pytest.raises(openai.BadRequestError) as caught:
        answer(extra_body={"structured_outputs": {"regex": "(("}})
    assert caught.value.param == "structured_outputs"


def test_known_prompts_are_counted(client: openai.OpenAI, session: Session) -> None:
    for _ in range(2):
        done = client.chat.completions.create(model="tiny", messages=say("One two three. " * 8), max_tokens=2)
    assert done.usage is not None and done.usage.prompt_tokens_details is not None
    ids = session.encode(session.render([{"role": "user", "content": "One two three. " * 8}]))
    assert 64 <= done.usage.prompt_tokens_details.cached_tokens == session._reader.whole(ids) < len(ids)
    off = client.chat.completions.create(
        model="tiny", messages=say("One two three. " * 8), max_tokens=2, extra_body={"cache_prompt": False}
    )
    assert off.usage is not None and off.usage.prompt_tokens_details is not None
    assert off.usage.prompt_tokens_details.cached_tokens == 0


TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"n": {"type": "integer", "maximum": 99}},
                "required": ["n"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("square", "cube")
]


@pytest.fixture
def tooled(tiny_artifact: Path, tmp_path: Path) -> Iterator[openai.OpenAI]:
    """An artifact whose template knows tools."""
    copy = copy_of(tiny_artifact, tmp_path)
    template = copy / "chat_template.jinja"
    template.write_text("{% if tools %}{{ tools | tojson }}{% endif %}" + template.read_text())
    widen(copy)
    seal(copy)
    with (
        Session(open_artifact(copy)) as session,
        served(session) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def test_tools(tooled: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": say("hello"), "tools": TOOLS, "max_tokens": 60}
    plain = tooled.chat.completions.create(**{**asked, "max_tokens": 5})
    assert plain.choices[0].message.tool_calls is None and plain.choices[0].finish_reason == "length"
    named = {"type": "function", "function": {"name": "cube"}}
    for choice in (named, "required"):
        whole = tooled.chat.completions.create(**asked, tool_choice=choice).choices[0]
        assert whole.finish_reason == "tool_calls" and whole.message.content is None
        (call,) = whole.message.tool_calls or []
        assert call.type == "function" and call.function.name in ("square", "cube")
        assert json.loads(call.function.arguments)["n"] <= 99
        chunks = list(tooled.chat.completions.create(**asked, tool_choice=choice, stream=True))
        assert not any(chunk.choices[0].delta.content for chunk in chunks)
        (delta,) = [d for chunk in chunks for d in chunk.choices[0].delta.tool_calls or []]
        assert delta.index == 0 and delta.function is not None
        assert (delta.function.name, delta.function.arguments) == (call.function.name, call.function.arguments)
        assert chunks[-1].choices[0].finish_reason == "tool_calls"
    turns: Any = [
        *say("hello"),
        whole.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "8"},
    ]
    assert tooled.chat.completions.create(**{**asked, "messages": turns, "max_tokens": 3}).choices[0].message.content


def test_tools_for_a_template_without_them(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="knows no tools") as caught:
        client.chat.completions.create(model="tiny", messages=say("hello"), tools=TOOLS)
    assert caught.value.param == "tools"


def test_refusals(client: openai.OpenAI, session: Session) -> None:
    create = client.chat.completions.create
    with pytest.raises(openai.BadRequestError) as wrong:
        create(model="tiny", messages=say("hello"), n=2)
    assert (wrong.value.param, wrong.value.code) == ("n", "unsupported_parameter")
    with pytest.raises(openai.NotFoundError) as unknown:
        create(model="gpt-4", messages=say("hello"))
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        create(model="tiny", messages=say("hello " * 2000))
    assert long.value.code == "context_length_exceeded"
    assert str(session.artifact.max_length) in long.value.message
    with pytest.raises(openai.BadRequestError) as hot:
        create(model="tiny", messages=say("hello"), temperature=3)
    assert hot.value.param == "temperature"


def test_unicode_in_and_out(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=say("naïve 東京 👋🏽 Привет"), max_tokens=40, temperature=1.9, seed=3
    )
    text = answer.choices[0].message.content or ""
    assert text == text.encode().decode()


@pytest.fixture
def held() -> Iterator[tuple[FakeSession, openai.OpenAI]]:
    """A client of a service without a queue, whose model takes as long as the test wants."""
    session = FakeSession()
    with (
        served(session, queue=0) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        yield session, client
        session.release.set()


def test_a_stream_that_is_closed_frees_the_model(held: tuple[FakeSession, openai.OpenAI]) -> None:
    session, client = held
    stream = client.chat.completions.create(model="tiny", messages=say("hold a"), stream=True)
    next(iter(stream))
    stream.close()
    eventually(lambda: session.cancelled == ["hold a"], 2)


def test_full_queue_and_the_client_s_own_retry(held: tuple[FakeSession, openai.OpenAI]) -> None:
    session, client = held
    stream = client.chat.completions.create(model="tiny", messages=say("hold a"), stream=True)
    with pytest.raises(openai.RateLimitError) as full:
        client.chat.completions.create(model="tiny", messages=say("echo b"))
    assert int(full.value.response.headers["retry-after"]) >= 1
    assert full.value.code == "queue_full"
    session.release.set()
    assert len(list(stream)) == 3
    patient = client.with_options(max_retries=2)
    assert patient.chat.completions.create(model="tiny", messages=say("echo b")).usage


def test_an_error_in_the_stream_is_raised(held: tuple[FakeSession, openai.OpenAI]) -> None:
    _, client = held
    stream = client.chat.completions.create(model="tiny", messages=say("break-later a"), stream=True)
    with pytest.raises(openai.APIError, match="the graph fell over"):
        list(stream)
    with pytest.raises(openai.InternalServerError, match="the graph fell over"):
        client.chat.completions.create(model="tiny", messages=say("break"))


def test_eight_clients_at_once(address: str, session: Session) -> None:
    prompts = [f"What is {n} plus {n}?" for n in range(8)]
    expected = [
        session.generate([{"role": "user", "content": prompt}], GenerationOptions(max_tokens=20)).text
        for prompt in prompts
    ]

    async def everyone() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:

            async def one(prompt: str) -> str:
                stream = await client.chat.completions.create(
                    model="tiny", messages=say(prompt), max_tokens=20, stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*map(one, prompts))

    assert asyncio.run(everyone()) == expected
    assert len(set(expected)) > 1


def test_two_hundred_answers_leave_no_threads(client: openai.OpenAI) -> None:
    def ask() -> None:
        client.chat.completions.create(model="tiny", messages=say("hello"), max_tokens=2)

    ask()
    before = threading.active_count()
    for _ in range(200):
        ask()
    assert threading.active_count() == before
