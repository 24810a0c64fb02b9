"""/v1/models: the model's names, and its adapters', as OpenAI's and Anthropic's clients know models."""

from __future__ import annotations

import datetime
import time
from typing import Any

from fastapi import FastAPI, Request

from pymllm.server.anthropic_words import VERSION
from pymllm.server.service import Service


def add_routes(app: FastAPI, service: Service) -> None:
    """Add /v1/models and /v1/models/NAME."""
    created = int(time.time())

    def card(name: str, request: Request) -> dict[str, Any]:
        if VERSION in request.headers:
            when = datetime.datetime.fromtimestamp(created, datetime.timezone.utc)
            return {"type": "model", "id": name, "display_name": name, "created_at": when.isoformat()}
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "pymllm",
            "root": service.llm.plan.model,
            "parent": None if name in service.names else service.model_name,
            "max_model_len": service.llm.plan.kv_cache.get("max_model_len"),
        }

    @app.api_route("/v1/models", methods=["GET", "HEAD"])
    async def models(request: Request) -> dict[str, Any]:
        names = (*service.names, *service.llm.adapters)
        cards = [card(name, request) for name in names]
        if VERSION in request.headers:
            return {"data": cards, "has_more": False, "first_id": names[0], "last_id": names[-1]}
        return {"object": "list", "data": cards}

    @app.api_route("/v1/models/{name:path}", methods=["GET", "HEAD"], response_model=None)
    async def model(name: str, request: Request) -> dict[str, Any]:
        service.adapter_of(name)
        return card(name, request)
