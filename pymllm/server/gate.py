"""The gate before the routes: bounds on headers and bodies, the API key, errors as OpenAI clients know them."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
from collections.abc import Collection, Mapping

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from pymllm.asynchronous.places import Busy
from pymllm.errors import PymllmError, counted
from pymllm.server.refusals import error_body, refusal_of

logger = logging.getLogger("pymllm")

OPEN_PATH = "/health"

# nginx's status for a client that has left; nobody receives it.
CLIENT_GONE = 499


def add_gate(
    app: FastAPI, api_key: str | None, *, header_bytes: int, open_paths: Collection[str] = (OPEN_PATH,)
) -> None:
    """Put the guard before all routes of `app`, and give every error its JSON.

    api_key: every request must bring it, but for those of open paths; None: none need it.
    header_bytes: how large the headers may be.
    """
    app.add_middleware(Guard, api_key=api_key, header_bytes=header_bytes, open_paths=open_paths)
    for error, handler in HANDLERS.items():
        app.add_exception_handler(error, handler)


async def read_body(http: Request) -> bytes:
    """Read the body, within bounds of size and time.

    Raises HTTPException: 400 for a bad Content-Length, 413 for too large a body, 408 for too slow a client, 503 when
    too much is being received already.
    """
    traffic = http.app.state.traffic
    limits = traffic.limits
    declared = http.headers.get("content-length", "0")
    if not (declared.isascii() and declared.isdecimal()):
        raise HTTPException(400, "Content-Length is not a number")
    if len(declared) > 15 or int(declared) > limits.body_bytes:
        raise HTTPException(413, f"the body is larger than {counted(limits.body_bytes, 'byte')}")
    try:
        return await asyncio.wait_for(_read_at_most(http, limits.body_bytes), limits.body_seconds)
    except asyncio.TimeoutError:
        raise HTTPException(408, f"the body did not arrive within {limits.body_seconds:g} seconds") from None


async def _read_at_most(http: Request, limit: int) -> bytes:
    body, traffic = bytearray(), http.app.state.traffic
    try:
        async for piece in http.stream():
            body += piece
            traffic.arriving += len(piece)
            if len(body) > limit:
                raise HTTPException(413, f"the body is larger than {counted(limit, 'byte')}")
            if traffic.arriving > traffic.limits.arriving_bytes:
                http.state.refusal = "bodies"
                headers = {"Retry-After": traffic.retry_after()}
                raise HTTPException(503, "too many bytes of requests are arriving", headers)
        return bytes(body)
    finally:
        traffic.arriving -= len(body)


class Guard:
    """The check before everything else: the size of the headers, the length of the body said once, and the API key."""

    def __init__(
        self, app: ASGIApp, api_key: str | None, header_bytes: int, open_paths: Collection[str]
    ) -> None:
        self.app, self.header_bytes, self.open_paths = app, header_bytes, frozenset(open_paths)
        self.key = None if api_key is None else _digest(b"bearer " + api_key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        await (self.app if refusal is None else refusal)(scope, receive, send)

    def _refusal(self, scope: Scope) -> Response | None:
        if sum(len(name) + len(value) for name, value in scope["headers"]) > self.header_bytes:
            return error_response(431, f"the headers are larger than {counted(self.header_bytes, 'byte')}")
        names = {name for name, _ in scope["headers"]}
        if b"transfer-encoding" in names and b"content-length" in names:
            # Whatever is before this server may go by the other one, and take the rest for a request of its own.
            message = "Content-Length and Transfer-Encoding exclude each other"
            return error_response(400, message, headers={"Connection": "close"})
        if self.key is None or scope["path"] in self.open_paths:
            return None
        sent = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        # Digests of equal length are compared in constant time, so that the answer's delay tells nothing of the key.
        scheme, space, key = sent.partition(b" ")
        if hmac.compare_digest(_digest(scheme.lower() + space + key), self.key):
            return None
        headers = {"WWW-Authenticate": "Bearer"}
        # Clients tell by these words that it is the key, not the request.
        return error_response(
            401, "Incorrect API key provided, or none", code="invalid_api_key", headers=headers
        )


def _digest(value: bytes) -> bytes:
    return hashlib.sha256(value).digest()


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    return JSONResponse(error_body(status, message, param=param, code=code), status, headers)


async def _on_pymllm_error(http: Request, error: Exception) -> Response:
    assert isinstance(error, PymllmError)
    status, body = refusal_of(error)
    if status >= 500:
        logger.error("a request failed: %s", error)
    if status != 503:
        return JSONResponse(body, status)
    http.state.refusal = "stopping" if error.code == "shutting-down" else "unhealthy"
    return JSONResponse(body, status, {"Retry-After": http.app.state.traffic.retry_after()})


async def _on_busy(http: Request, error: Exception) -> Response:
    http.state.refusal = "line_full"
    headers = {"Retry-After": http.app.state.traffic.retry_after()}
    return error_response(503, "too many requests are waiting", code="overloaded", headers=headers)


async def _on_http_error(http: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return error_response(error.status_code, str(error.detail), headers=error.headers)


async def _on_gone(http: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


async def _on_defect(http: Request, error: Exception) -> Response:
    # The traceback is in the log.
    headers = (
        {"X-Request-Id": request_id} if (request_id := getattr(http.state, "request_id", None)) else None
    )
    return error_response(500, "internal error", headers=headers)


HANDLERS = {
    PymllmError: _on_pymllm_error,
    Busy: _on_busy,
    HTTPException: _on_http_error,
    ClientDisconnect: _on_gone,
    Exception: _on_defect,
}
