"""/v1/models: the model's names, and its adapters'."""

from __future__ import annotations

import time
from typing import Any

from fastapi import FastAPI

from pymllm.server.service import Service


def add_routes(app: FastAPI, service: Service) -> None:
    """Add /v1/models and /v1/models/NAME."""
    created = int(time.time())

    def card(name: str) -> dict[str, Any]:
        parent = {} if name in service.names else {"parent": service.model_name}
        return {"id": name, "object": "model", "created": created, "owned_by": "pymllm", **parent}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {
            "object": "list",
            "data": [card(name) for name in (*service.names, *service.llm.adapters)],
        }

    @app.get("/v1/models/{name:path}", response_model=None)
    async def model(name: str) -> dict[str, Any]:
        service.adapter_of(name)
        return card(name)
