"""/plan: what runs, with which kernel, and why: the JSON of docs/plan-schema.md."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from pymllm.server.service import Service


def add_routes(app: FastAPI, service: Service) -> None:
    """Add /plan."""

    @app.get("/plan")
    async def plan() -> dict[str, Any]:
        return service.llm.plan.to_dict()
