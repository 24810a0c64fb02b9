"""The HTTP application of one model: its endpoints, each a file of `endpoints/`."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from pymllm.api import LLM
from pymllm.engine.scheduler import MAX_REQUESTS
from pymllm.server.access_log import AccessLog
from pymllm.server.admission import Admission
from pymllm.server.anthropic_words import AnthropicWords
from pymllm.server.endpoints import (
    anthropic,
    chat,
    completions,
    embeddings,
    health,
    metrics,
    models,
    page,
    plan,
    responses,
    tokens,
    version,
)
from pymllm.server.gate import OPEN_PATH, add_gate
from pymllm.server.limits import Limits
from pymllm.server.origin import OriginCheck
from pymllm.server.page_files import page_paths
from pymllm.server.records import Records
from pymllm.server.service import Service
from pymllm.server.traffic import Traffic

MAX_WAITING = 64
ENDPOINTS = (
    *(
        health,
        metrics,
        models,
        completions,
        chat,
        embeddings,
        responses,
        anthropic,
        tokens,
        version,
        plan,
        page,
    ),
)


def create_app(
    llm: LLM,
    *,
    model_name: str,
    other_names: Sequence[str] = (),
    api_key: str | None = None,
    max_running: int = MAX_REQUESTS,
    max_waiting: int = MAX_WAITING,
    limits: Limits | None = None,
    cors: Sequence[str] = (),
    allowed_hosts: Sequence[str] = (),
    access_log: AccessLog | None = None,
    open_metrics: bool = False,
) -> FastAPI:
    """Make the application for one loaded model.

    model_name: what clients call the model, and answers too; other_names: what they may call it as well; adapters are
    called by their own names.
    api_key: every request but /health and the page's files must bring it; None: none need it.
    max_running: how many prompts are answered together.  max_waiting: how many more may wait; a request beyond these
    gets 503.  limits: of all else that clients may take.
    cors: origins whose pages may ask.  allowed_hosts: see `OriginCheck`.  access_log: where requests are logged.
    open_metrics: whether /metrics needs no key.
    Its `state` has the `service` and the `traffic`.
    """
    # No schema pages: the bodies are read by `protocol/`, and FastAPI does not know their shape.
    app = FastAPI(title="pymllm", docs_url=None, redoc_url=None, openapi_url=None)
    limits = limits or Limits()
    service = Service(llm, model_name, max_running, max_waiting, other_names)
    service.worker.pulse.seconds = limits.step_seconds
    traffic = Traffic(limits, service.worker)
    app.state.service, app.state.traffic = service, traffic
    # From the inside out.
    open_paths = {OPEN_PATH, *page_paths(), *((metrics.PATH,) if open_metrics else ())}
    add_gate(app, api_key, header_bytes=limits.header_bytes, open_paths=open_paths)
    if api_key is None:
        app.add_middleware(OriginCheck, allowed_hosts=allowed_hosts, origins=cors)
    app.add_middleware(Admission, traffic=traffic)
    app.add_middleware(AnthropicWords)
    if cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=cors,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "X-Request-Id"],
        )
    app.add_middleware(Records, traffic=traffic, access_log=access_log)
    for endpoint in ENDPOINTS:
        endpoint.add_routes(app, service)
    return app
