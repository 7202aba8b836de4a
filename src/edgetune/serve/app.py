"""The routes of the service: they read requests, queue them, and write answers, errors and the log."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
import traceback
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgetune.progress import say
from edgetune.runtime.artifact import NO_ADAPTER
from edgetune.serve.error import ApiError
from edgetune.serve.messages import with_system
from edgetune.serve.reply import Reply, model_object
from edgetune.serve.schema import ChatRequest
from edgetune.serve.worker import Answer, Cancelled, Failed, QueueFull, Refused, Worker

if TYPE_CHECKING:
    from edgetune.runtime.session import Piece, Session

MAX_BODY = 4 * 2**20
_MAX_DRAINED = 16 * MAX_BODY
_CLIENT_LEFT = 499  # the status that log readers know for "the client closed the connection"
# Some clients end lines at these, which JSON leaves as they are; an event must stay on one line.
_LINE_ENDS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}


def create_app(session: Session, name: str, queue: int, system: str | None = None) -> FastAPI:
    """The service as an ASGI application.

    Args:
        session: the loaded artifact.
        name: the model's name, which requests must give; `NAME:ADAPTER` asks for an adapter of the artifact's.
        queue: how many requests may wait while one is answered.
        system: the system prompt of conversations that bring none; it is read now.

    Returns:
        The application; its `state.worker` is the queue, to be stopped before the server is.
    """
    # No documentation pages: they would load scripts from the internet.
    app = FastAPI(title="edgetune", docs_url=None, redoc_url=None, openapi_url=None)
    worker = app.state.worker = Worker(session, queue)
    created = int(time.time())
    if system is not None:
        session.read(with_system([{"role": "user", "content": ""}], system))
    models = models_of(session.adapters, name)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        running, waiting = worker.load()
        return {"status": "ok", "model": name, "running": running, "waiting": waiting}

    @app.get("/v1/models")
    async def all_models() -> dict[str, Any]:
        return {"object": "list", "data": [model_object(each, created, name) for each in models]}

    @app.get("/v1/models/{model:path}")
    async def one_model(model: str) -> dict[str, Any]:
        _check_model(model, models)
        return model_object(model, created, name)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        asked = ChatRequest.parse(await _read_body(request))
        _check_model(asked.model, models)
        answer = request.state.answer = _submit(worker, asked, models[asked.model], system)
        if asked.stream:
            return await _streamed(request, answer, asked)
        return await _whole(request, answer, asked)

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def unrouted(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}."
        return JSONResponse(ApiError(error.status_code, message).body(), error.status_code, error.headers)

    @app.exception_handler(Refused)
    async def unanswerable(request: Request, error: Refused) -> Response:
        return await refused(request, ApiError(400, str(error), param=error.param, code=error.code))

    @app.exception_handler(Failed)
    async def failed(request: Request, error: Failed) -> Response:
        return await refused(request, _failure(error))

    @app.exception_handler(Cancelled)
    async def given_up(request: Request, error: Cancelled) -> Response:
        if worker.stopping:
            return await refused(request, _stopped())
        return Response(status_code=_CLIENT_LEFT)  # nobody reads it; the log shows it

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> Response:
        # A fault of this code: the server's logger prints the traceback, the client gets an answer.
        return JSONResponse(ApiError(500, f"Internal error: {type(error).__name__}.").body(), 500)

    app.add_middleware(_Log)
    return app


def models_of(adapters: Sequence[str], name: str) -> dict[str, str | None]:
    """The models that an artifact stands for, and the adapter of each: itself, and with each adapter and none of them."""
    if not adapters:
        return {name: None}
    return {name: None, **{f"{name}:{adapter}": adapter for adapter in (*adapters, NO_ADAPTER)}}


def _check_model(asked: str, models: Mapping[str, str | None]) -> None:
    if asked not in models:
        known = ", ".join(repr(name) for name in models)
        raise ApiError(
            404,
            f"The model {asked!r} does not exist here; this service has {known}.",
            param="model",
            code="model_not_found",
        )


async def _read_body(request: Request) -> bytes:
    body, size = bytearray(), 0
    try:
        async for part in request.stream():
            size += len(part)
            if size <= MAX_BODY:
                body += part
            elif size > _MAX_DRAINED:
                break
    except ClientDisconnect:
        raise Cancelled from None
    # Too long a body is read on, unkept: a client that still writes would miss the answer.
    if size > MAX_BODY:
        raise ApiError(413, f"The body is over {MAX_BODY // 2**20} MiB.", code="request_too_large")
    return bytes(body)


def _submit(worker: Worker, asked: ChatRequest, adapter: str | None, system: str | None) -> Answer:
    messages, tools = with_system(asked.conversation(), system), asked.functions()
    options = replace(asked.options(), adapter=adapter)
    try:
        return worker.submit(messages, options, tools)
    except QueueFull as full:
        raise ApiError(
            429,
            f"The queue is full; try again in {full.retry_after} s.",
            code="queue_full",
            headers={"Retry-After": str(full.retry_after)},
        ) from None


@contextlib.asynccontextmanager
async def _given_up_on_disconnect(request: Request, answer: Answer) -> AsyncIterator[None]:
    """Cancel the answer when its client goes away while the block runs, or when the block fails."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        answer.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    except BaseException:
        answer.cancel()
        raise
    finally:
        watching.cancel()


async def _whole(request: Request, answer: Answer, asked: ChatRequest) -> Response:
    async with _given_up_on_disconnect(request, answer):
        text = "".join([piece.text async for piece in answer])
    reply = Reply(asked.model, one_call=asked.parallel_tool_calls is False)
    return JSONResponse(reply.whole(text, answer.result()))


async def _streamed(request: Request, answer: Answer, asked: ChatRequest) -> Response:
    pieces = aiter(answer)
    async with _given_up_on_disconnect(request, answer):
        first = await anext(pieces, None)  # what fails before the first word still gets a status of its own
    include_usage = bool(asked.stream_options and asked.stream_options.include_usage)
    reply = Reply(asked.model, include_usage, one_call=asked.parallel_tool_calls is False)
    return _EventStream(answer, _events(answer, first, pieces, reply, include_usage))


async def _events(
    answer: Answer, first: Piece | None, pieces: AsyncIterator[Piece], reply: Reply, include_usage: bool
) -> AsyncIterator[str]:
    yield _event(reply.chunk({"role": "assistant", "content": ""}))
    try:
        if first:
            yield _event(reply.chunk({"content": first.text}, logprobs=first.logprobs))
        async for piece in pieces:
            yield _event(reply.chunk({"content": piece.text}, logprobs=piece.logprobs))
    except Failed as error:
        yield _event(_failure(error).body())
        return
    except Cancelled:
        yield _event(_stopped().body())  # the client reads this only where it is the service that gave up
        return
    done = answer.result()
    for chunk in reply.last_chunks(done):
        yield _event(chunk)
    if include_usage:
        yield _event(reply.usage_chunk(done))
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":")).translate(_LINE_ENDS)
    return f"data: {text}\n\n"


class _EventStream(StreamingResponse):
    """Server-sent events of one answer, which is given up when the client stops listening."""

    def __init__(self, answer: Answer, events: AsyncIterator[str]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.cancel()


def _failure(error: Failed) -> ApiError:
    say(f"error: {error}")
    if os.environ.get("EDGETUNE_DEBUG"):
        traceback.print_exception(error)
    return ApiError(500, str(error), code="generation_failed")


def _stopped() -> ApiError:
    return ApiError(503, "The service is stopping.", code="stopping")


class _Log:
    """One line a request on stderr: method, path, status, tokens, seconds."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500
        state = scope.setdefault("state", {})
        started = time.monotonic()

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            # The path as it came, percent-encoded: what a stranger sends must not steer the terminal.
            path = scope.get("raw_path", b"").decode("ascii", "replace")
            parts = [f"{scope['method']} {path} {status}"]
            answer: Answer | None = state.get("answer")
            done = answer.completion if answer else None
            if done:
                parts.append(f"{done.prompt_tokens}+{done.completion_tokens} tokens")
            if answer and (done.finish_reason == "cancelled" if done else answer.stop.is_set()):
                parts.append("cancelled")
            say(", ".join([*parts, f"{time.monotonic() - started:.2f} s"]))
