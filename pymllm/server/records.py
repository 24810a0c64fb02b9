"""The outermost layer of the app: each request gets an id, and when it ends is counted, and has a line in the log."""

from __future__ import annotations

import re
import time
import uuid
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pymllm.server.access_log import AccessLog
from pymllm.server.gate import CLIENT_GONE
from pymllm.server.traffic import METHODS, OTHER, Traffic

ID_HEADER = b"x-request-id"
# What may go into a header and a log as it is.
SANE_ID = re.compile(rb"[A-Za-z0-9._:+/=@-]{1,128}")


class Records:
    """The record of each request.  HEAD is answered here too: as GET, without the body."""

    def __init__(self, app: ASGIApp, traffic: Traffic, access_log: AccessLog | None) -> None:
        self.app, self.traffic, self.access_log = app, traffic, access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), CLIENT_GONE
        method = scope["method"]
        # Its own copy: the router writes the route into it.
        scope = {**scope, "method": "GET" if method == "HEAD" else method}
        state = scope.setdefault("state", {})
        state["request_id"] = request_id = id_of(scope)

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (ID_HEADER, request_id.encode())]}
            elif method == "HEAD":
                message = {**message, "body": b""}
            await send(message)

        try:
            await self.app(scope, receive, send_on)
        except Exception:
            status = 500  # what lies outside says so
            raise
        finally:
            path = path_of(scope)
            self.traffic.note_answer(method, path, status, state.get("refusal"))
            if self.access_log is not None:
                self.access_log.write(
                    {
                        "time": round(time.time(), 3),
                        "request_id": request_id,
                        "client": client_of(scope),
                        "method": method if method in METHODS else OTHER,
                        "path": path,
                        "status": status,
                        "ms": round(1000 * (time.perf_counter() - started), 1),
                        **tokens_of(state),
                    }
                )


def id_of(scope: Scope) -> str:
    """Return the id that a client gave its request, if that is a sane one, or make one."""
    for name, value in scope["headers"]:
        if name == ID_HEADER and SANE_ID.fullmatch(value):
            return str(value.decode())
    return uuid.uuid4().hex


def client_of(scope: Scope) -> str:
    """Return the client's address; a proxy on this machine may have named it, so that it is cut to what one can be."""
    words = str((scope.get("client") or ("",))[0]).split()
    return words[0][:64] if words else "-"


def path_of(scope: Scope) -> str:
    """Return the path as its route spells it; no client's text goes into logs or labels."""
    path = getattr(scope.get("route"), "path", None)
    return path if isinstance(path, str) else OTHER


def tokens_of(state: dict[str, Any]) -> dict[str, int]:
    """Return the numbers of tokens of a request that generated."""
    generation = state.get("generation")
    if generation is None:
        return {}
    prompts = {one.place: len(one.ids) for one in generation.asked}
    return {"prompt_tokens": sum(prompts.values()), "completion_tokens": generation.answered}
