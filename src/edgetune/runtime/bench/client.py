"""A client of OpenAI-compatible services, as little as a benchmark needs: which models, and one streamed answer.

Follows the published reference of `GET /v1/models` and of `POST /v1/chat/completions` with `stream`, whose answer is
server-sent events (WHATWG HTML, 9.2). Written on `http.client`, so that a time stamp is taken when a line arrives.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import ssl
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from edgetune.errors import EdgetuneError, InputError
from edgetune.runtime.bench.workloads import DoesNotFit

_KEY = "OPENAI_API_KEY"
_MOST_BYTES = 8 << 20
_LONGEST_S = 86_400.0  # of silence
_MOST_PIECES = 8  # a token: a service that does not end is left
_START = "start it first (`edgetune serve ARTIFACT`), and check host and port"


@dataclass(frozen=True)
class Service:
    """Where a service listens, and what it is asked for.

    Attributes:
        base: its address up to where the routes begin, such as `http://127.0.0.1:8080/v1`.
        model: the model's name.
        timeout_s: how long it may say nothing.
        usage: it counts tokens when it is asked to.
    """

    base: str
    model: str
    timeout_s: float
    usage: bool = True


@dataclass
class Answer:
    """One streamed answer; times in seconds of `time.perf_counter`.

    Attributes:
        sent: when the request was sent.
        stamps: when each piece with text arrived.
        ended: when the stream ended.
        text: the answer.
        prompt_tokens, completion_tokens: as the service counts them, None where it does not.
        cached_tokens: of the prompt's, those that it says it had already.
        streamed: it came in pieces.
        error: what went wrong, None where nothing did.
    """

    sent: float
    stamps: list[float] = field(default_factory=list)
    ended: float = 0.0
    text: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    streamed: bool = True
    error: str | None = None


def connect(url: str, model: str | None, timeout_s: float) -> Service:
    """Find out where the routes of a service begin, and which model it has.

    Args:
        url: `http://host:port`, with or without `/v1`.
        model: the name to ask for; where None, the only one that it has.

    Raises:
        InputError: it is no address, nobody answers there, it is not OpenAI-compatible, wants a key, or has several
            models or not this one; a timeout that cannot be.
    """
    if not 0 < timeout_s <= _LONGEST_S:
        raise InputError(
            f"must be over 0 and at most {_LONGEST_S:,.0f} s, not {timeout_s}", where="timeout", fix="such as 300"
        )
    fix = "such as http://127.0.0.1:8080"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise InputError(f"is no address: {error}", where=url, fix=fix) from error
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise InputError("is no http:// or https:// address", where=url, fix=fix)
    base = url.rstrip("/")
    bases = [base] if base.endswith("/v1") else [f"{base}/v1", base]
    status, body = 0, b""
    for candidate in bases:
        status, body = _get(f"{candidate}/models", timeout_s)
        if status == 200:
            return Service(candidate, _model(candidate, body, model), timeout_s)
        if status in (401, 403):
            raise InputError("asks for a key", where=candidate, fix=f"put it into the environment variable {_KEY}")
    if model and status in (404, 405, 501):  # a service without a list of models; the first request will tell
        return Service(bases[0], model, timeout_s)
    raise InputError(
        f"is not OpenAI-compatible: GET {urlsplit(bases[0]).path}/models gives status {status}{_told(body)}",
        where=url,
        fix="give the address that its OpenAI-compatible routes begin at",
    )


def _get(url: str, timeout_s: float) -> tuple[int, bytes]:
    try:
        with contextlib.closing(_connection(url, timeout_s)) as connection:
            connection.request("GET", _path(url), headers=_headers())
            answer = connection.getresponse()
            return answer.status, answer.read(_MOST_BYTES)
    except (OSError, http.client.HTTPException, UnicodeError) as error:  # UnicodeError: no host can have that name
        raise InputError(f"nobody answers there: {_why(error)}", where=url, fix=_START) from error


def _model(base: str, body: bytes, wanted: str | None) -> str:
    try:
        names = [str(entry["id"]) for entry in json.loads(body)["data"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            "is not OpenAI-compatible: what it gives as its models is no list of them",
            where=f"{base}/models",
            fix="give the address that its OpenAI-compatible routes begin at",
        ) from error
    if wanted is not None:
        if names and wanted not in names:
            raise InputError(f"has no model {wanted!r}", where=base, fix=f"it has {', '.join(names[:12])}")
        return wanted
    if len(names) != 1:
        has = f"several models: {', '.join(names[:12])}" if names else "no model"
        raise InputError(f"has {has}", where=base, fix="name one with --model")
    return names[0]


def ask(service: Service, messages: list[dict[str, str]], max_tokens: int) -> Answer:
    """Ask for one answer, greedily, and read it as it comes. What goes wrong is told in the answer."""
    body: dict[str, Any] = {
        "model": service.model,
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
    }
    if service.usage:
        body["stream_options"] = {"include_usage": True}
    url = f"{service.base}/chat/completions"
    connection = _connection(url, service.timeout_s)
    answer = Answer(sent=time.perf_counter())
    try:
        connection.connect()
        answer.sent = time.perf_counter()
        headers = {**_headers(), "Content-Type": "application/json", "Accept": "text/event-stream"}
        connection.request("POST", _path(url), json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            answer.error = f"status {response.status}{_told(response.read(_MOST_BYTES))}"
        elif "json" in response.headers.get("Content-Type", ""):
            _whole(response, answer)
        else:
            _stream(response, answer, max_tokens)
    except (
        OSError,
        http.client.HTTPException,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        RecursionError,
    ) as error:
        answer.error = _why(error)
    finally:
        connection.close()
    answer.ended = time.perf_counter()
    if answer.error is None and not answer.text:
        answer.error = "the answer is empty"
    return answer


def _stream(response: http.client.HTTPResponse, answer: Answer, max_tokens: int) -> None:
    """Read server-sent events; comments, names and fields that are not data do not matter here."""
    while line := response.readline(_MOST_BYTES):
        now = time.perf_counter()
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        event = json.loads(data)
        if event.get("error"):
            answer.error = f"in the stream: {_message(event)}"
            return
        _usage(event, answer)
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            text = (
                (delta.get("reasoning_content") or "") + (delta.get("reasoning") or "") + (delta.get("content") or "")
            )
            if text:
                answer.stamps.append(now)
                answer.text += text
        if len(answer.stamps) > _MOST_PIECES * max_tokens:
            answer.error = f"it sends more than the {max_tokens} tokens that it was asked for"
            return


def _whole(response: http.client.HTTPResponse, answer: Answer) -> None:
    """An answer in one piece, of a service that does not stream."""
    found = json.loads(response.read(_MOST_BYTES))
    if found.get("error"):
        answer.error = _message(found)
        return
    answer.streamed = False
    answer.text = str(found["choices"][0]["message"]["content"] or "")
    _usage(found, answer)


def _usage(event: dict[str, Any], answer: Answer) -> None:
    usage = event.get("usage") or {}
    for key in ("prompt_tokens", "completion_tokens"):
        if isinstance(usage.get(key), int):
            setattr(answer, key, usage[key])
    details = usage.get("prompt_tokens_details") or {}
    if isinstance(details.get("cached_tokens"), int):
        answer.cached_tokens = details["cached_tokens"]


def checked(service: Service, answer: Answer, name: str) -> Service | None:
    """What to do after the first answer: None where all is well, else the service asked in another way.

    Raises:
        DoesNotFit: it refused the workload of this name.
        EdgetuneError: it failed, and no other way is known.
    """
    if answer.error is None:
        return None
    if service.usage and not_taken(answer) and "stream_options" in answer.error:
        return Service(service.base, service.model, service.timeout_s, usage=False)
    if not_taken(answer):
        raise refusal(service, answer, name)
    raise EdgetuneError(
        f"the service does not answer: {answer.error}", where=service.base, fix="see what it says itself; check --model"
    )


def not_taken(answer: Answer) -> bool:
    """Whether the service refused the request itself, as it does where its context does not hold it."""
    return (answer.error or "").startswith(("status 400", "status 413", "status 422"))


def refusal(service: Service, answer: Answer, name: str) -> DoesNotFit:
    """The error of a workload that a service does not take."""
    fix = "see what it says itself; check --model, take fewer prompt tokens or new tokens, or another workload"
    return DoesNotFit(f"the service does not take {name}: {answer.error}", where=service.base, fix=fix)


def _connection(url: str, timeout_s: float) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    assert parts.hostname is not None
    if parts.scheme == "https":
        context = ssl.create_default_context()
        return http.client.HTTPSConnection(parts.hostname, parts.port, timeout=timeout_s, context=context)
    return http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout_s)


def _path(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.path}?{parts.query}" if parts.query else parts.path


def _headers() -> dict[str, str]:
    key = os.environ.get(_KEY)
    return {"User-Agent": "edgetune-bench"} | ({"Authorization": f"Bearer {key}"} if key else {})


def _told(body: bytes) -> str:
    """What an error's body says, in a line."""
    text = body.decode("utf-8", "replace").strip()
    try:
        found = json.loads(text)
        text = _message(found) if isinstance(found, dict) else text
    except ValueError:
        pass
    text = " ".join(text.split())[:200]
    return f": {text}" if text else ""


def _message(found: dict[str, Any]) -> str:
    error = found.get("error") or found.get("message") or found.get("detail") or found
    return str(error.get("message", error) if isinstance(error, dict) else error)


def _why(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "it said nothing for too long"
    if isinstance(error, ssl.SSLError):
        return f"TLS fails ({error.reason or error}); is it http:// rather than https://?"
    text = getattr(error, "strerror", None) or str(error)
    return f"{text} ({type(error).__name__})" if text else type(error).__name__
