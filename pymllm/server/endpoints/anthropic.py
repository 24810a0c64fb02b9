"""/v1/messages: an answer to a conversation, as Anthropic's clients ask for it."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from pymllm.server.gate import read_body
from pymllm.server.protocol.anthropic import MessagesCount, MessagesRequest
from pymllm.server.service import Service
from pymllm.server.streaming import answer


def add_routes(app: FastAPI, service: Service) -> None:
    """Add /v1/messages and /v1/messages/count_tokens."""

    @app.post("/v1/messages")
    async def messages(request: Request) -> Response:
        return await answer(service, request, MessagesRequest)

    @app.post("/v1/messages/count_tokens")
    async def count_tokens(request: Request) -> Response:
        with service.worker.place():
            count = await service.count(MessagesCount, await read_body(request))
        return JSONResponse({"input_tokens": count})
