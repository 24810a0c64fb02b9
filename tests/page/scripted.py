"""A server of the page whose answers are scripted: what no model can be made to say, and how servers fail."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from pymllm.server.endpoints import page
from tests.processes import SECONDS


def deltas(*pieces: dict[str, Any], reason: str = "stop", tokens: int = 7) -> list[str]:
    """Spell a stream of chat chunks, the usage and the end: the events' data."""
    chunks: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": piece, "finish_reason": None}]} for piece in pieces
    ]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
    usage = {"prompt_tokens": 40, "completion_tokens": tokens, "prompt_tokens_details": {"cached_tokens": 32}}
    chunks.append({"choices": [], "usage": usage})
    return [*(json.dumps(chunk) for chunk in chunks), "[DONE]"]


def said(text: str) -> list[str]:
    """Spell a stream that says this text, three characters at a time, as tags would come in pieces."""
    return deltas(*({"content": text[at : at + 3]} for at in range(0, len(text), 3)))


@dataclass
class Scripted:
    """What the server answers, in turn, and what it was asked.

    answers: events' data, or a whole response.  pause: seconds after each event.  metrics: the text of /metrics;
    None: there is none.
    """

    url: str = ""
    answers: list[list[str] | Response] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    pause: float = 0
    plan: dict[str, Any] = field(default_factory=dict)
    metrics: str | None = None
    read: int = 0  # how often /metrics was read


def make_app(script: Scripted) -> FastAPI:
    """Make the application of a script."""
    app = FastAPI(openapi_url=None)
    page.add_routes(app, None)  # type: ignore[arg-type]  # the page asks the service nothing

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": "scripted"}, {"id": "poems", "parent": "scripted"}]}

    @app.get("/plan")
    async def plan() -> Response:
        return JSONResponse(script.plan, 200 if script.plan else 404)

    @app.get("/metrics")
    async def metrics() -> Response:
        script.read += 1
        return PlainTextResponse(script.metrics or "", 404 if script.metrics is None else 200)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        script.asked.append(await request.json())
        answer = script.answers.pop(0)
        if isinstance(answer, Response):
            return answer
        return StreamingResponse(_events(answer, script.pause), media_type="text/event-stream")

    return app


async def _events(answer: list[str], pause: float) -> Any:
    yield ": a comment keeps the connection open\n\n"
    for data in answer:
        yield f"data: {data}\n\n"
        await asyncio.sleep(pause)


@contextlib.contextmanager
def scripted_server() -> Iterator[Scripted]:
    """Serve a script until the block ends."""
    script = Scripted()
    server = uvicorn.Server(uvicorn.Config(make_app(script), ws="none", lifespan="off", log_level="error"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        script.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + SECONDS
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)
        try:
            yield script
        finally:
            server.should_exit = server.force_exit = True
            thread.join(SECONDS)
