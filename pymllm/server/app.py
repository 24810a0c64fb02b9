"""The HTTP application: its routes, and the path of a request through them."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Mapping
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from pymllm.api import LLM
from pymllm.asynchronous.worker import Generation
from pymllm.engine.scheduler import MAX_REQUESTS
from pymllm.engine.session import StreamPiece
from pymllm.errors import PymllmError, RequestError
from pymllm.server.answers import ChatAnswer, CompletionAnswer, usage_of
from pymllm.server.gate import OPEN_PATH, add_gate, read_body
from pymllm.server.protocol import ChatRequest, CompletionRequest
from pymllm.server.refusals import error_body
from pymllm.server.service import Service

logger = logging.getLogger("pymllm")

MAX_WAITING = 64

T = TypeVar("T")


def create_app(
    llm: LLM,
    *,
    model_name: str,
    api_key: str | None = None,
    max_running: int = MAX_REQUESTS,
    max_waiting: int = MAX_WAITING,
) -> FastAPI:
    """Make the application for one loaded model.

    model_name: what clients call the model; adapters are called by their own names.  api_key: every request but
    /health must bring it; None: none need it.  max_running: how many prompts are answered together.
    max_waiting: how many more may wait; a request beyond these gets 503.
    """
    # No schema pages: protocol.py reads the bodies, and FastAPI does not know their shape.
    app = FastAPI(title="pymllm", docs_url=None, redoc_url=None, openapi_url=None)
    add_gate(app, api_key)
    service = Service(llm, model_name, max_running, max_waiting)
    created = int(time.time())

    def card(name: str) -> dict[str, Any]:
        parent = {} if name == model_name else {"parent": model_name}
        return {"id": name, "object": "model", "created": created, "owned_by": "pymllm", **parent}

    @app.get(OPEN_PATH)
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card(name) for name in (model_name, *llm.adapters)]}

    @app.get("/v1/models/{name:path}", response_model=None)
    async def model(name: str) -> dict[str, Any]:
        service.adapter_of(name)
        return card(name)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(service, request, CompletionRequest)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await answer(service, request, ChatRequest)

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        return await embed(service, request)

    return app


async def answer(
    service: Service, http: Request, kind: type[CompletionRequest] | type[ChatRequest]
) -> Response:
    """Answer one HTTP request of this kind, whole or as a stream of events."""
    # Before any work.
    service.check_generates()
    service.worker.places.check()
    question = await service.read(kind, await read_body(http))
    generation = service.worker.start(question.asked)
    try:
        if not question.request.stream:
            return JSONResponse(await unless_gone(http, service.answer(question, generation)))
        # The first token comes before the headers, so that an error until then still gets its own status.
        first = await unless_gone(http, anext(generation))
    except BaseException as error:
        generation.close()
        if isinstance(error, RequestError):
            question.request.blame(error)
        raise
    options = question.request.stream_options
    usage = options is not None and options.include_usage
    events = stream_events(service.answer_to(question), generation, first, usage=usage)
    return _EventStream(generation, events)


async def embed(service: Service, http: Request) -> Response:
    """Answer one request for embeddings."""
    service.worker.places.check()
    question = await service.read_embedding(await read_body(http))
    with service.worker.place():
        return JSONResponse(await unless_gone(http, service.embed(question)))


async def unless_gone(http: Request, work: Awaitable[T]) -> T:
    """Wait for `work` and return its result; ClientDisconnect as soon as the client has left."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_until_gone(http))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _until_gone(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


class _EventStream(StreamingResponse):
    """A response of server-sent events; however the sending ends, it ends the generation too."""

    def __init__(self, generation: Generation, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.generation.close()


async def stream_events(
    answer: CompletionAnswer | ChatAnswer,
    generation: Generation,
    first: tuple[int, StreamPiece],
    *,
    usage: bool,
) -> AsyncIterator[str]:
    """Yield the events of one answer, [DONE] at the end.  If an error comes first, it is the last event instead."""
    tail = {"usage": None} if usage else {}
    outputs = {}
    for chunk in answer.opening(len(generation.asked)):
        yield _event({**chunk, **tail})
    try:
        async for index, piece in _chain(first, generation):
            if piece.output is not None:
                outputs[index] = piece.output
            for choice in answer.choices_of(index, piece):
                yield _event({**answer.chunk([choice]), **tail})
    except Exception as error:
        logger.error("a stream ended early: %s", error, exc_info=not isinstance(error, PymllmError))
        message = str(error) if isinstance(error, PymllmError) else "internal error"
        yield _event(error_body(500, message))
        return
    if usage:
        in_order = [outputs[index] for index in sorted(outputs)]
        yield _event({**answer.chunk([]), "usage": usage_of(in_order, answer.n)})
    yield "data: [DONE]\n\n"


async def _chain(
    first: tuple[int, StreamPiece], rest: AsyncIterator[tuple[int, StreamPiece]]
) -> AsyncIterator[tuple[int, StreamPiece]]:
    yield first
    async for item in rest:
        yield item


def _event(value: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"
