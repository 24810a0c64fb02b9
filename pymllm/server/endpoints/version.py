"""/version: which pymllm answers."""

from __future__ import annotations

from fastapi import FastAPI

import pymllm
from pymllm.server.service import Service


def add_routes(app: FastAPI, service: Service) -> None:
    """Add /version."""

    @app.api_route("/version", methods=["GET", "HEAD"])
    async def version() -> dict[str, str]:
        return {"version": pymllm.__version__}
