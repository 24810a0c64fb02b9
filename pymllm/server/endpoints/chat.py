"""/v1/chat/completions: an answer to a conversation."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import Response

from pymllm.server.protocol.chat import ChatRequest
from pymllm.server.service import Service
from pymllm.server.streaming import answer


def add_routes(app: FastAPI, service: Service) -> None:
    """Add /v1/chat/completions."""

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await answer(service, request, ChatRequest)
