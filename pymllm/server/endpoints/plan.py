"""/plan: what runs, with which kernel, and why: the JSON of docs/plan-schema.md."""

from __future__ import annotations

import json

from fastapi import FastAPI
from fastapi.responses import Response

from pymllm.planning.plan import Plan
from pymllm.server.service import Service


def add_routes(app: FastAPI, service: Service) -> None:
    """Add /plan."""

    # The plan that was written last, and its text: a swap makes another.
    written: list[tuple[Plan, bytes]] = []

    @app.api_route("/plan", methods=["GET", "HEAD"])
    async def plan() -> Response:
        made = service.llm.plan
        if not written or written[0][0] is not made:
            written[:] = [(made, json.dumps(made.to_dict(), ensure_ascii=False).encode())]
        return Response(written[0][1], media_type="application/json")
