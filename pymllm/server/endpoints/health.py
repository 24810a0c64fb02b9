"""/health: whether the server is alive."""

from __future__ import annotations

from fastapi import FastAPI

from pymllm.server.gate import OPEN_PATH
from pymllm.server.service import Service


def add_routes(app: FastAPI, service: Service) -> None:
    """Add /health."""

    @app.get(OPEN_PATH)
    async def health() -> dict[str, str]:
        return {"status": "ok"}
