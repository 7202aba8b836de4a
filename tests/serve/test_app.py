"""The service's protocol, with a session that has no model."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from serving import FakeSession, ask, call, events, eventually, get, post, served


@pytest.fixture
def session() -> FakeSession:
    return FakeSession()


@pytest.fixture
def address(session: FakeSession) -> Iterator[str]:
    with served(session, queue=2) as address:
        yield address
        session.release.set()


def waiting(address: str) -> int:
    return int(get(f"{address}/health").json()["waiting"])


def running(address: str) -> int:
    return int(get(f"{address}/health").json()["running"])


def start(address: str, body: dict[str, Any]) -> socket.socket:
    """Send a request and do not read its answer; closing the socket is the client going away."""
    host, port = address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    raw = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n"
    connection.sendall(head.encode() + raw)
    return connection


def test_whole_answer(address: str) -> None:
    response = post(address, ask("echo hello wörld 👋🏽"))
    body = response.json()
    assert response.status == 200
    assert body["object"] == "chat.completion"
    assert body["model"] == "tiny"
    assert body["choices"][0]["message"]["content"] == "hello wörld 👋🏽"
    assert body["choices"][0]["finish_reason"] == "stop"
    counts = {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}
    guesses = {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}
    assert body["usage"] == {
        **counts,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": guesses,
    }


def test_stream(address: str) -> None:
    response = post(address, ask("echo one two", stream=True, stream_options={"include_usage": True}))
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = events(response)
    assert done == "[DONE]"
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "one two"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == 5
    assert len({chunk["id"] for chunk in [*chunks, usage]}) == 1


def test_stream_without_usage(address: str) -> None:
    chunks = events(post(address, ask("echo one", stream=True)))[:-1]
    assert all("usage" not in chunk for chunk in chunks)


def test_line_separators_stay_inside_an_event(address: str) -> None:
    text = "a\u2028b\u2029c\x85d"
    chunks = events(post(address, ask(f"echo {text}", stream=True)))[:-1]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text
    raw = post(address, ask(f"echo {text}", stream=True)).text
    assert "\u2028" not in raw


def test_models_and_health(address: str) -> None:
    assert [model["id"] for model in get(f"{address}/v1/models").json()["data"]] == ["tiny"]
    assert get(f"{address}/v1/models/tiny").json()["object"] == "model"
    missing = get(f"{address}/v1/models/other")
    assert (missing.status, missing.json()["error"]["code"]) == (404, "model_not_found")
    assert get(f"{address}/health").json() == {
        "status": "ok",
        "model": "tiny",
        "running": 0,
        "waiting": 0,
    }


def test_adapters_are_models_of_their_own() -> None:
    session = FakeSession()
    session.adapters = ("sql", "tone")
    with served(session) as address:
        listed = get(f"{address}/v1/models").json()["data"]
        assert [model["id"] for model in listed] == ["tiny", "tiny:sql", "tiny:tone", "tiny:none"]
        assert "parent" not in listed[0] and listed[1]["parent"] == "tiny"
        assert get(f"{address}/v1/models/tiny:tone").json() == listed[2]
        for model, adapter in (("tiny", None), ("tiny:sql", "sql"), ("tiny:none", "none")):
            assert post(address, ask(model=model)).json()["model"] == model
            assert session.asked[-1][1].adapter == adapter
        missing = post(address, ask(model="tiny:other"))
        assert missing.status == 404 and "'tiny:sql'" in missing.json()["error"]["message"]


def test_name_with_a_slash(session: FakeSession) -> None:
    with served(session, name="org/tiny") as address:
        assert get(f"{address}/v1/models/org/tiny").json()["id"] == "org/tiny"


def test_no_pages_from_elsewhere(address: str) -> None:
    for path in ("/docs", "/redoc", "/openapi.json"):
        assert get(address + path).status == 404


def test_unknown_route_and_method(address: str) -> None:
    missing = get(f"{address}/v1/embeddings")
    assert missing.status == 404
    assert "/v1/embeddings" in missing.json()["error"]["message"]
    wrong = get(f"{address}/v1/chat/completions")
    assert (wrong.status, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'{"model": "tiny", "messages": [}', b"\xff\xfe", b'{"a":' * 5000]
)
def test_broken_body(address: str, body: bytes) -> None:
    response = call("POST", f"{address}/v1/chat/completions", body)
    assert response.status == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_long_body(address: str) -> None:
    assert post(address, ask("echo " + "ä" * 500_000)).status == 200
    for stream in (False, True):
        response = post(address, ask("x" * (4 * 2**20), stream=stream))
        assert (response.status, response.json()["error"]["code"]) == (413, "request_too_large")


def test_chunked_body_over_the_limit(address: str) -> None:
    parts = (b"x" * 2**16 for _ in range(100))
    assert call("POST", f"{address}/v1/chat/completions", parts).status == 413


def test_wrong_model(address: str) -> None:
    response = post(address, {**ask(), "model": "gpt-4"})
    error = response.json()["error"]
    assert (response.status, error["code"], error["param"]) == (404, "model_not_found", "model")


def test_error_before_the_first_word(address: str) -> None:
    for stream in (False, True):
        response = post(address, ask("break", stream=stream))
        assert response.status == 500
        assert response.json()["error"]["type"] == "server_error"
        assert "the graph fell over" in response.json()["error"]["message"]
    assert post(address, ask()).status == 200


def test_error_in_the_stream(address: str) -> None:
    response = post(address, ask("break-later first", stream=True))
    got = events(response)
    assert response.status == 200
    assert got[1]["choices"][0]["delta"]["content"] == "first"
    assert "the graph fell over" in got[-1]["error"]["message"]
    assert post(address, ask()).status == 200


def test_error_of_the_input(address: str) -> None:
    for stream in (False, True):
        response = post(address, ask("refuse", stream=stream))
        error = response.json()["error"]
        assert (response.status, error["type"], error["param"]) == (
            400,
            "invalid_request_error",
            "messages",
        )


def test_prompt_over_the_context(address: str) -> None:
    for stream in (False, True):
        response = post(address, ask("a " * 600, stream=stream))
        error = response.json()["error"]
        assert (response.status, error["code"], error["param"]) == (
            400,
            "context_length_exceeded",
            "messages",
        )
        assert "600" in error["message"]
        assert "512" in error["message"]


def test_full_queue(address: str, session: FakeSession) -> None:
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(post, address, ask("hold a"))]
        eventually(lambda: running(address) == 1)
        answers += [pool.submit(post, address, ask("echo b")) for _ in range(2)]
        eventually(lambda: waiting(address) == 2)
        refused = post(address, ask("echo c"))
        assert refused.status == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.json()["error"]["code"] == "queue_full"
        session.release.set()
        assert [answer.result().status for answer in answers] == [200, 200, 200]
    assert post(address, ask()).status == 200


def test_no_queue_at_all(session: FakeSession) -> None:
    with served(session, queue=0) as address, ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, address, ask("hold a"))
        eventually(lambda: running(address) == 1)
        assert post(address, ask()).status == 429
        session.release.set()
        assert first.result().status == 200
        assert post(address, ask()).status == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_answer(address: str, session: FakeSession, stream: bool) -> None:
    connection = start(address, ask("hold a", stream=stream))
    eventually(lambda: running(address) == 1)
    if stream:
        assert connection.recv(1)
    connection.close()
    eventually(lambda: session.cancelled == ["hold a"], 2)
    assert post(address, ask()).status == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_the_queue_frees_its_place(address: str, session: FakeSession, stream: bool) -> None:
    first = start(address, ask("hold a"))
    eventually(lambda: running(address) == 1)
    gone = [start(address, ask(f"echo gone {i}", stream=stream)) for i in range(2)]
    eventually(lambda: waiting(address) == 2)
    for connection in gone:
        connection.close()
    eventually(lambda: waiting(address) == 0, 2)
    session.release.set()
    assert post(address, ask("echo next")).status == 200
    assert [prompt for prompt, _ in session.asked] == ["hold a", "echo next"]
    first.close()


def test_a_client_that_does_not_read_holds_nobody_up(address: str, session: FakeSession) -> None:
    words = " ".join(["word" * 1000] * 300)
    slow = start(address, ask(f"echo {words}", stream=True))
    assert post(address, ask("echo next")).status == 200
    slow.close()


def test_order_and_no_mixing(session: FakeSession) -> None:
    with served(session, queue=40) as address, ThreadPoolExecutor(33) as pool:
        held = pool.submit(post, address, ask("hold a"))
        eventually(lambda: running(address) == 1)
        answers = []
        for n in range(32):
            answers.append(pool.submit(post, address, ask(f"echo number {n}", stream=n % 2 == 0)))
            eventually(lambda n=n: waiting(address) == n + 1)
        session.release.set()
        held.result()
        for n, answer in enumerate(answers):
            response = answer.result()
            text = (
                response.text
                if n % 2
                else "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in events(response)[:-1])
            )
            assert (json.loads(text)["choices"][0]["message"]["content"] if n % 2 else text) == f"number {n}"
    assert [prompt for prompt, _ in session.asked[1:]] == [f"echo number {n}" for n in range(32)]
    assert session.most_together == 1


def test_the_loop_stays_free(address: str, session: FakeSession) -> None:
    connection = start(address, ask("hold a"))
    eventually(lambda: running(address) == 1)
    started = time.monotonic()
    for _ in range(10):
        get(f"{address}/health")
    assert time.monotonic() - started < 20
    connection.close()


def test_many_requests_leave_no_threads(address: str) -> None:
    post(address, ask())
    before = threading.active_count()
    for n in range(200):
        assert post(address, ask(f"echo {n}", stream=n % 2 == 0)).status == 200
    assert threading.active_count() == before


def test_stopping_cancels_what_runs_and_waits(session: FakeSession) -> None:
    with ThreadPoolExecutor(3) as pool:
        with served(session) as address:
            whole = pool.submit(post, address, ask("hold a"))
            eventually(lambda: running(address) == 1)
            queued = pool.submit(post, address, ask("echo b"))
            eventually(lambda: waiting(address) == 1)
            started = time.monotonic()
        assert time.monotonic() - started < 20
        for answer in (whole, queued):
            assert (answer.result().status, answer.result().json()["error"]["code"]) == (503, "stopping")
    assert session.cancelled == ["hold a"]
    with pytest.raises(ConnectionRefusedError):
        get(f"{address}/health")


def test_stopping_ends_a_stream_with_an_error(session: FakeSession) -> None:
    with ThreadPoolExecutor(1) as pool:
        with served(session) as address:
            answer = pool.submit(post, address, ask("hold a", stream=True))
            eventually(lambda: running(address) == 1)
            time.sleep(0.1)
        assert events(answer.result())[-1]["error"]["code"] == "stopping"


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr("edgetune.serve.app.say", lines.append)
    return lines


def test_log_line(log: list[str], address: str) -> None:
    post(address, ask("echo a b"))
    get(f"{address}/%1b[31m%0aevil?key=secret")
    post(address, ask(n=2))
    eventually(lambda: len(log) == 3)
    assert re.fullmatch(r"POST /v1/chat/completions 200, 3\+2 tokens, \d+\.\d\d s", log[0])
    assert re.fullmatch(r"GET /%1b\[31m%0aevil 404, \d+\.\d\d s", log[1])  # no control characters, no query
    assert re.fullmatch(r"POST /v1/chat/completions 400, \d+\.\d\d s", log[2])


def test_log_of_a_client_that_left(log: list[str], address: str, session: FakeSession) -> None:
    connection = start(address, ask("hold a"))
    eventually(lambda: running(address) == 1)
    connection.close()
    eventually(lambda: any(line.startswith("POST /v1/chat/completions 499, cancelled") for line in log))


def test_internal_fault_is_an_answer(session: FakeSession) -> None:
    session.artifact = None  # what the routes rely on is gone
    with served(session) as address:
        response = post(address, ask())
        assert (response.status, response.json()["error"]["type"]) == (500, "server_error")
        assert get(f"{address}/health").status == 200
