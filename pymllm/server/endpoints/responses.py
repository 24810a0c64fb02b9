"""/v1/responses: an answer to a conversation, as items."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from pymllm.server.gate import read_body
from pymllm.server.protocol.responses import ResponsesCount, ResponsesRequest
from pymllm.server.service import Service
from pymllm.server.streaming import answer


def add_routes(app: FastAPI, service: Service) -> None:
    """Add /v1/responses and /v1/responses/input_tokens."""

    @app.post("/v1/responses")
    async def responses(request: Request) -> Response:
        return await answer(service, request, ResponsesRequest)

    @app.post("/v1/responses/input_tokens")
    async def input_tokens(request: Request) -> Response:
        with service.worker.place():
            count = await service.count(ResponsesCount, await read_body(request))
        return JSONResponse({"object": "response.input_tokens", "input_tokens": count})
