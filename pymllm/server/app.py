"""The HTTP application of one model: its endpoints, each a file of `endpoints/`."""

from __future__ import annotations

from fastapi import FastAPI

from pymllm.api import LLM
from pymllm.engine.scheduler import MAX_REQUESTS
from pymllm.server.endpoints import chat, completions, embeddings, health, models
from pymllm.server.gate import add_gate
from pymllm.server.service import Service

MAX_WAITING = 64
ENDPOINTS = (health, models, completions, chat, embeddings)


def create_app(
    llm: LLM,
    *,
    model_name: str,
    api_key: str | None = None,
    max_running: int = MAX_REQUESTS,
    max_waiting: int = MAX_WAITING,
) -> FastAPI:
    """Make the application for one loaded model.

    model_name: what clients call the model; adapters are called by their own names.  api_key: every request but
    /health must bring it; None: none need it.  max_running: how many prompts are answered together.
    max_waiting: how many more may wait; a request beyond these gets 503.
    """
    # No schema pages: the bodies are read by `protocol/`, and FastAPI does not know their shape.
    app = FastAPI(title="pymllm", docs_url=None, redoc_url=None, openapi_url=None)
    add_gate(app, api_key)
    service = app.state.service = Service(llm, model_name, max_running, max_waiting)
    for endpoint in ENDPOINTS:
        endpoint.add_routes(app, service)
    return app
