"""/metrics: what the server has done and does, for Prometheus."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import Response

from pymllm.server.metrics import Exposition
from pymllm.server.service import Service

PATH = "/metrics"


def add_routes(app: FastAPI, service: Service) -> None:
    """Add /metrics."""
    exposition = Exposition(service, app.state.traffic)

    @app.get(PATH)
    async def metrics(request: Request) -> Response:
        text, media_type = exposition.write(request.headers.get("accept", ""))
        return Response(text, headers={"Content-Type": media_type})
