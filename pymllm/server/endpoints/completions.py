"""/v1/completions: text that goes on from a prompt."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import Response

from pymllm.server.protocol.completions import CompletionRequest
from pymllm.server.service import Service
from pymllm.server.streaming import answer


def add_routes(app: FastAPI, service: Service) -> None:
    """Add /v1/completions."""

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(service, request, CompletionRequest)
