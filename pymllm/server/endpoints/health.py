"""/health: whether the server is alive."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.responses import JSONResponse

from pymllm.server.gate import OPEN_PATH
from pymllm.server.refusals import error_body
from pymllm.server.service import Service


def add_routes(app: FastAPI, service: Service) -> None:
    """Add /health."""

    @app.get(OPEN_PATH)
    async def health() -> JSONResponse:
        why = service.worker.why_not_healthy()
        if why is not None:
            return JSONResponse({"status": "unhealthy", **error_body(503, why)}, 503)
        return JSONResponse({"status": "ok"})
