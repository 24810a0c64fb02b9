"""/health: whether the server answers requests now."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from pymllm.server.gate import OPEN_PATH
from pymllm.server.service import Service


def add_routes(app: FastAPI, service: Service) -> None:
    """Add /health: 200, or 503 with the reason."""

    @app.get(OPEN_PATH)
    async def health(request: Request) -> Response:
        reason = request.app.state.traffic.why_not_healthy()
        if reason is None:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "unavailable", "reason": reason}, 503)
