"""The way of a request that generates, from its body to an answer, whole or as a stream of events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable
from typing import TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from pymllm.asynchronous.worker import REMINDER, Generation
from pymllm.engine.session import StreamPiece
from pymllm.errors import PymllmError, RequestError
from pymllm.server.answers.base import Answer
from pymllm.server.gate import read_body
from pymllm.server.protocol.conversation import ConversationRequest
from pymllm.server.protocol.sampled import SampledRequest
from pymllm.server.refusals import refusal_of, words_of
from pymllm.server.service import Service

logger = logging.getLogger("pymllm")

T = TypeVar("T")

# A comment of server-sent events, which clients skip: neither they nor proxies take a silent connection for a dead one.
PING = ": ping\n\n"


async def answer(
    service: Service, http: Request, kind: type[SampledRequest] | type[ConversationRequest]
) -> Response:
    """Answer one HTTP request of this kind, whole or as a stream of events."""
    # Before any work.
    service.check_generates()
    service.worker.places.check()
    question = await service.read(kind, await read_body(http))
    generation = http.state.generation = service.worker.start(question.asked)
    limits = http.app.state.traffic.limits
    try:
        if not question.stream:
            return JSONResponse(await unless_gone(http, service.answer(question, generation)))
        generation.most_behind = limits.pieces
        if limits.ping_seconds:
            generation.remind_every(limits.ping_seconds)
        # The first token comes before the headers, so that an error until then still gets its own status; a reminder
        # comes, too, as clients do not wait for headers for ever.
        first = await unless_gone(http, anext(generation))
    except BaseException as error:
        generation.close()
        if isinstance(error, RequestError):
            question.blame(error)
        raise
    return _EventStream(generation, stream_events(service.answer_to(question), generation, first))


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
    answer: Answer, generation: Generation, first: tuple[int, StreamPiece]
) -> AsyncIterator[str]:
    """Yield the events of one answer.  If an error comes, the events that tell of it are the last."""
    outputs = {}
    for event in answer.begin(len(generation.asked)):
        yield event.encode()
    try:
        async for index, piece in _chain(first, generation):
            if piece is REMINDER[1]:
                yield PING
                continue
            if piece.output is not None:
                outputs[index] = piece.output
            for event in answer.add(index, piece):
                yield event.encode()
    except Exception as error:
        status, message = 500, "internal error"
        if isinstance(error, PymllmError):
            status, message = refusal_of(error)[0], words_of(error)
        if status == 500:
            logger.error("a stream ended early: %s", error, exc_info=not isinstance(error, PymllmError))
        for event in answer.fail(status, message):
            yield event.encode()
        return
    for event in answer.end([outputs[index] for index in sorted(outputs)]):
        yield event.encode()


async def _chain(
    first: tuple[int, StreamPiece], rest: AsyncIterator[tuple[int, StreamPiece]]
) -> AsyncIterator[tuple[int, StreamPiece]]:
    yield first
    async for item in rest:
        yield item
