"""The benchmark over HTTP: a made-up service that behaves well and badly, and our own."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from artifacts import tiny_artifact  # noqa: F401
from conftest import edgetune
from edgetune.errors import EdgetuneError, GateError, InputError
from edgetune.files import read_json
from edgetune.recipe import BenchOptions, BenchSection
from edgetune.runtime.bench import client, http, watch
from edgetune.runtime.bench.compare import compare, compare_url
from edgetune.runtime.bench.http import bench_url
from edgetune.runtime.bench.page import as_html
from edgetune.runtime.bench.report import schema
from edgetune.runtime.bench.text import table
from edgetune.runtime.bench.verdict import check

SECTION = BenchSection(prompt_tokens=10, new_tokens=6, warmup=1, repetitions=2)
MODELS = {"object": "list", "data": [{"id": "m"}]}
Respond = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]


def send(handler: BaseHTTPRequestHandler, status: int, body: Any, kind: str = "application/json") -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    handler.send_header("Content-Type", kind)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def events(*parts: Any) -> bytes:
    return b"".join(
        b"data: " + (part if isinstance(part, bytes) else json.dumps(part).encode()) + b"\n\n" for part in parts
    )


def piece(text: str) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}}]}


def well(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
    """Six pieces, 10 ms apart, then what was counted."""
    handler.send_response(200)
    handler.send_header("Content-Type", "text/event-stream")
    handler.end_headers()
    handler.wfile.write(b": a comment\n\n" + events({"choices": [{"delta": {"role": "assistant", "content": ""}}]}))
    for n in range(6):
        time.sleep(0.01)
        handler.wfile.write(events(piece(f"{n} ")))
        handler.wfile.flush()
    usage = {"prompt_tokens": 12, "completion_tokens": 11}
    counted = [{"choices": [], "usage": usage}] if "stream_options" in asked else []
    handler.wfile.write(events(*counted, b"[DONE]"))


@contextlib.contextmanager
def service(
    respond: Respond = well, models: Any = MODELS, status: int = 200
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A service; gives its address and the bodies that it was sent."""
    bodies: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            if self.path == "/v1/models":
                send(self, status, models)
            else:
                send(self, 404, {"detail": "Not Found"})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            bodies.append({"path": self.path, "key": self.headers.get("Authorization"), **asked})
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                respond(self, asked)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", bodies
    finally:
        server.shutdown()
        server.server_close()


def test_report_of_a_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with service() as (url, bodies):
        report = bench_url(url + "/", None, (1, 3), SECTION, tmp_path / "out")
    jsonschema.validate(report, schema(), cls=jsonschema.Draft202012Validator)
    assert read_json(tmp_path / "out" / "report.json") == report and "secret" not in json.dumps(report)
    assert report["artifact"] == "m" and report["target"]["url"] == url + "/v1"
    first, second = report["workloads"]
    assert (first["name"], second["name"]) == ("pp10+tg6, 1 client", "pp10+tg6, 3 clients") and second["requests"] == 6
    assert first["errors"] == 0 and first["prompt_tokens"] == 12 and first["new_tokens"] == 11
    assert second["tokens"] == 66 and first["ttft_ms"]["min"] >= 10 and first["itl_ms"]["n"] == 2 * 5
    sample = report["samples"][0]
    assert sample["tpot_ms"] == pytest.approx(sum(sample["itl_ms"]) / 10, abs=0.01)  # 11 tokens came in 6 pieces
    assert second["total_tokens_per_s"] > 1.5 * first["total_tokens_per_s"]
    assert len(bodies) == 1 + 2 + 6 and len({body["messages"][0]["content"] for body in bodies}) == 9
    assert all(
        body["key"] == "Bearer secret" and body["max_tokens"] == 6 and body["temperature"] == 0 for body in bodies
    )
    shown = dict(table(report))
    assert "in all" in shown["pp10+tg6, 3 clients"] and "model m" in shown["service"]


def test_tokens_are_pieces_where_none_are_counted(tmp_path: Path):
    def strict(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        if "stream_options" in asked:
            send(handler, 400, {"error": {"message": "Unknown parameter: stream_options"}})
        else:
            well(handler, asked)

    own = tmp_path / "own.jsonl"
    own.write_text('{"prompt": "one"}\n{"messages": [{"role": "user", "content": "two"}]}\n')
    with service(strict) as (url, bodies):
        report = bench_url(url, None, (1,), SECTION, None, BenchOptions(prompts=str(own)))
    entry = report["workloads"][0]
    assert entry["new_tokens"] == 6 and entry["prompt_tokens"] is None and entry["prefill_tokens_per_s"] is None
    notes = " ".join(report["warnings"])
    assert "each piece that it sent is taken for one" in notes and "no prefill rate" in notes
    asked = [body["messages"][0]["content"] for body in bodies]
    assert asked[-4:] == ["one", "two", "one", "two"] and "the same in each round" in notes and entry["rounds"] == 2
    assert entry["name"] == "prompts, 1 client" and entry["kind"] == "file"
    jsonschema.validate(report, schema(), cls=jsonschema.Draft202012Validator)


def test_service_that_does_not_stream():
    def whole(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        send(handler, 200, {"choices": [{"message": {"content": "words"}}], "usage": {"completion_tokens": 3}})

    with service(whole) as (url, _):
        report = bench_url(url, "m", (1,), SECTION)
    assert report["ttft_ms"] is None and report["workloads"][0]["e2e_ms"]["n"] == 2
    assert any("does not stream" in text for text in report["warnings"])
    jsonschema.validate(report, schema(), cls=jsonschema.Draft202012Validator)


def test_failures_are_counted_and_told():
    seen = []

    def flaky(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        seen.append(1)
        if len(seen) == 2:
            send(handler, 429, {"error": {"message": "The queue is full."}})
        elif len(seen) == 3:
            send(handler, 200, events(piece("a"), {"error": {"message": "out of memory"}}), "text/event-stream")
        elif len(seen) == 4:
            send(handler, 200, b"data: {broken\n\n", "text/event-stream")
        elif len(seen) == 5:
            send(handler, 200, events({"choices": [{}]}, b"[DONE]"), "text/event-stream")
        else:
            well(handler, asked)

    with service(flaky) as (url, _):
        report = bench_url(url, None, (1,), SECTION.model_copy(update={"repetitions": 6}))
    entry = report["workloads"][0]
    assert (entry["requests"], entry["errors"]) == (6, 4) and "queue is full" in entry["error"]
    assert "4 of 6 requests failed" in report["warnings"][0] and entry["itl_ms"]["n"] == 2 * 5


@pytest.mark.parametrize(
    ("respond", "what"),
    [
        (lambda h, _: send(h, 500, b"<html>broken</html>", "text/html"), "status 500: <html>broken"),
        (lambda h, _: send(h, 200, b"", "text/event-stream"), "the answer is empty"),
        (lambda h, _: send(h, 200, []), "AttributeError"),
        (lambda h, _: send(h, 200, events(*[piece("a")] * 60), "text/event-stream"), "more than the 6 tokens"),
        (lambda h, _: send(h, 200, b"data: " + b"[" * 200_000 + b"\n\n", "text/event-stream"), "RecursionError"),
        (lambda h, _: h.wfile.write(b"nonsense\r\n\r\n"), "nonsense"),
        (lambda h, _: time.sleep(0.6), "nothing for too long"),
    ],
)
def test_service_that_never_answers(respond: Respond, what: str):
    with service(respond) as (url, _), pytest.raises(EdgetuneError, match=what):
        bench_url(url, None, (1,), SECTION, timeout_s=0.3)


@pytest.mark.parametrize(
    ("models", "status", "model", "what"),
    [
        ({"models": []}, 200, None, "is no list of them"),
        (b"<html>", 200, None, "is no list of them"),
        ({"data": []}, 200, None, "has no model"),
        ({"data": [{"id": "a"}, {"id": "b"}]}, 200, None, "several models: a, b"),
        (MODELS, 200, "other", "has no model 'other'"),
        ({"error": {"message": "no key"}}, 401, None, "asks for a key"),
        ({"detail": "gone"}, 500, None, "not OpenAI-compatible: GET /v1/models gives status 500: gone|status 404"),
    ],
)
def test_what_is_no_such_service(models: Any, status: int, model: str | None, what: str):
    with service(models=models, status=status) as (url, _), pytest.raises(InputError, match=what):
        bench_url(url, model, (1,), SECTION)


@pytest.mark.parametrize(
    "url", ["127.0.0.1:80", "ftp://host", "http://", "http://host:99999", "http://[::1", "http://a b"]
)
def test_what_is_no_address(url: str):
    with pytest.raises(InputError, match=r"address|nobody answers there"):
        bench_url(url, None, (1,), SECTION)


def test_nobody_there_and_wrong_counts():
    with pytest.raises(InputError, match=r"nobody answers there(.|\n)*edgetune serve"):
        bench_url("http://127.0.0.1:9", None, (1,), SECTION)
    with pytest.raises(InputError, match="must be 1 to 1024, not 0"):
        bench_url("http://127.0.0.1:9", None, (0,), SECTION)


def test_model_is_asked_for_where_none_are_listed():
    with service(status=404) as (url, bodies):
        report = bench_url(url + "/v1", "mine", (1,), SECTION)
    assert report["artifact"] == "mine" and {body["model"] for body in bodies} == {"mine"}


def test_tls_where_there_is_none():
    with service() as (url, _), pytest.raises(InputError, match="TLS fails"):
        client.connect(url.replace("http:", "https:"), None, 5)


def test_conversations_and_copying():
    with service() as (url, bodies):
        options = BenchOptions(workloads=("pp4", "tg3@d50", "chat", "copy"))
        report = bench_url(url, None, (2,), SECTION.model_copy(update={"warmup": 0}), None, options)
    jsonschema.validate(report, schema(), cls=jsonschema.Draft202012Validator)
    entries = {entry["name"]: entry for entry in report["workloads"]}
    assert list(entries) == [f"{name}, 2 clients" for name in ("pp4", "tg3@d50", "chat", "copy")]
    assert entries["chat, 2 clients"]["requests"] == 2 * 2 * 4 and entries["copy, 2 clients"]["quoted"] == 0
    talks = [body["messages"] for body in bodies if len(body["messages"]) == 7]
    assert [message["role"] for message in talks[0]] == ["user", "assistant"] * 3 + ["user"] and len(talks) == 4
    assert talks[0][1]["content"] == "0 1 2 3 4 5 "
    assert {body["max_tokens"] for body in bodies} == {1, 3, 6}
    deep = [body["messages"][0]["content"] for body in bodies if body["max_tokens"] == 3]
    assert {len(text.split()) for text in deep} == {50} and entries["tg3@d50, 2 clients"]["depth"] == 50
    assert entries["tg3@d50, 2 clients"]["ttft_ms"] is None and entries["pp4, 2 clients"]["ttft_ms"]
    turns = [
        (s["client"], s["turn"]) for s in report["samples"] if s["workload"] == "chat, 2 clients" and s["round"] == 1
    ]
    assert turns == [(client, turn) for client in (1, 2) for turn in (1, 2, 3, 4)]


def test_a_conversation_that_fills_the_context_is_no_failure():
    def small(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        if len(asked["messages"]) > 3:
            send(handler, 400, {"error": {"message": "the context is full"}})
        else:
            well(handler, asked)

    with service(small) as (url, _):
        report = bench_url(url, None, (1,), SECTION, None, BenchOptions(workloads=("chat",)))
    entry = report["workloads"][0]
    assert (entry["requests"], entry["errors"]) == (4, 0)
    assert report["warnings"][0].startswith("2 conversations ended early") and "full" in report["warnings"][0]


def takes_little(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
    """A service whose context holds 20 words."""
    if len(asked["messages"][0]["content"].split()) > 20:
        send(handler, 400, {"error": {"message": "the prompt is too long"}})
    else:
        well(handler, asked)


def test_what_the_service_does_not_take_is_left_out_and_the_rest_is_kept(tmp_path: Path):
    options = BenchOptions(workloads=("pp64", "pp8+tg4", "copy"))
    with service(takes_little) as (url, _):
        report = bench_url(url, None, (1, 2), SECTION, tmp_path / "out", options)
        with pytest.raises(
            InputError, match=r"does not take copy: status 400: the prompt is too long(.|\n)*another workload"
        ):
            bench_url(url, None, (1,), SECTION, None, BenchOptions(workloads=("copy",)))
    assert read_json(tmp_path / "out" / "report.json") == report
    jsonschema.validate(report, schema(), cls=jsonschema.Draft202012Validator)
    assert [entry["name"] for entry in report["workloads"]] == ["pp8+tg4, 1 client", "pp8+tg4, 2 clients"]
    said = [text.split(":")[0] for text in report["warnings"] if "was not measured" in text]
    assert said == [
        f"{name}, {count} was not measured" for name in ("pp64", "copy") for count in ("1 client", "2 clients")
    ]


def half_as_fast(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
    time.sleep(0.08)
    well(handler, asked)


def flaky_once() -> Respond:
    """Fails at the third request: the first is the warm-up."""
    seen: list[int] = []

    def respond(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        seen.append(1)
        (send(handler, 500, {"error": "no"}) if len(seen) == 3 else well(handler, asked))

    return respond


def test_two_services_in_turn(tmp_path: Path):
    options = BenchOptions(workloads=("copy",))
    section = SECTION.model_copy(update={"repetitions": 3})
    with service() as (one, bodies), service(half_as_fast, {"data": [{"id": "n"}]}) as (two, others):
        report = compare_url(one, None, two, None, (1, 2), section, tmp_path / "out", options)
        with pytest.raises(InputError, match="is the same service and model"):
            compare_url(one, None, one, None, (1,), section)
    jsonschema.validate(report, schema(), cls=jsonschema.Draft202012Validator)
    found = report["comparison"]
    assert (
        found["interleaved"] and found["name"].startswith("m at 127.0.0.1:") and found["baseline"].startswith("n at ")
    )
    whats = [(one["workload"], one["what"]) for one in found["ratios"]]
    assert whats == [(f"copy, {n}", what) for n in ("1 client", "2 clients") for what in ("first token", "decode")]
    assert found["ratios"][0]["value"] > 1 and found["ratios"][0]["low"] and "first token" in found["verdict"][0]
    assert sorted(b["messages"][0]["content"] for b in bodies) == sorted(b["messages"][0]["content"] for b in others)
    assert "produced texts differ" not in " ".join(found["notes"]) and not found["faults"]
    assert as_html(report).count('class="line dashed') == 4  # latency of both levels, rates over clients
    saved = tmp_path / "out" / "report.json"
    with service() as (url, _):
        again = compare_url(url, None, str(saved), None, (1,), section, None, options)
        with pytest.raises(InputError, match="is of a service, not of an artifact"):
            compare(tmp_path, saved, section)
    with service() as (one, _), service(flaky_once()) as (two, _):
        unsure = compare_url(two, None, one, None, (1,), section, None, options)["comparison"]
    with pytest.raises(GateError, match=r"1 of 3 requests of m at .* failed"):
        check(unsure, 0.01)
    found = again["comparison"]
    assert not found["interleaved"] and found["faults"] == [f"copy, 2 clients was measured of {found['baseline']} only"]


def test_energy_of_all_levels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(watch, "joules", lambda before, after: 1.5)
    with service() as (url, _):
        report = bench_url(url, None, (1, 2), SECTION)
    assert report["energy_j"] == 3.0 and report["workloads"][0]["energy_j_per_token"] == round(1.5 / 22, 5)


def test_our_own_service(tiny_artifact: Path, tmp_path: Path):  # noqa: F811
    import uvicorn

    from edgetune.runtime import load
    from edgetune.serve.app import create_app

    with load(tiny_artifact) as session:
        app = create_app(session, "tiny", 8)
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        short = ("--prompt-tokens", "8", "--new-tokens", "4", "--repetitions", "2", "--concurrency", "1,2")
        done = edgetune("bench", "--url", f"http://127.0.0.1:{port}", *short, "--json", "--out", tmp_path / "out")
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        jsonschema.validate(report, schema(), cls=jsonschema.Draft202012Validator)
        assert report["artifact"] == "tiny" and [entry["errors"] for entry in report["workloads"]] == [0, 0]
        assert report["workloads"][0]["prompt_tokens"] > 8 and report["peak_rss_mb"] > 10
        server.should_exit = True
        thread.join(10)
        app.state.worker.stop()


def test_listener_of_a_far_address_is_not_looked_for():
    assert http._listener("http://192.0.2.1:80/v1") is None and http._listener("http://example.org/v1") is None
