"""/v1/embeddings: texts as vectors."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from pymllm.server.gate import read_body
from pymllm.server.service import Service
from pymllm.server.streaming import unless_gone


def add_routes(app: FastAPI, service: Service) -> None:
    """Add /v1/embeddings."""

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        service.worker.places.check()
        question = await service.read_embedding(await read_body(request))
        with service.worker.place():
            return JSONResponse(await unless_gone(request, service.embed(question)))
