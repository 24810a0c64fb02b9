"""The gate before the routes: bounds on headers and bodies, the API key, errors as OpenAI clients know them."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from pymllm.asynchronous.places import Busy
from pymllm.errors import PymllmError
from pymllm.server.page_files import page_paths
from pymllm.server.refusals import error_body, refusal_of

logger = logging.getLogger("pymllm")

MAX_BODY_BYTES = 4 << 20
MAX_HEADER_BYTES = 16 << 10
RETRY_AFTER_SECONDS = 5
OPEN_PATH = "/health"

# How long a client may take to send its whole body.
BODY_SECONDS = 30.0

# nginx's status for a client that has left; nobody receives it.
CLIENT_GONE = 499


def add_gate(app: FastAPI, api_key: str | None) -> None:
    """Put the guard before all routes of `app`, and give every error its JSON.

    api_key: every request but /health and the page's files must bring it; None: none need it.
    """
    app.add_middleware(Guard, api_key=api_key)
    for error, handler in HANDLERS.items():
        app.add_exception_handler(error, handler)


async def read_body(http: Request) -> bytes:
    """Read the body, within bounds of size and time.

    Raises HTTPException: 400 for a bad Content-Length, 413 for too large a body, 408 for too slow a client.
    """
    declared = http.headers.get("content-length", "0")
    if not (declared.isascii() and declared.isdecimal()):
        raise HTTPException(400, "Content-Length is not a number")
    if len(declared) > 15 or int(declared) > MAX_BODY_BYTES:
        raise HTTPException(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
    try:
        return await asyncio.wait_for(_read_at_most(http, MAX_BODY_BYTES), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise HTTPException(408, f"the body did not arrive within {BODY_SECONDS:.0f} seconds") from None


async def _read_at_most(http: Request, limit: int) -> bytes:
    body = bytearray()
    async for piece in http.stream():
        body += piece
        if len(body) > limit:
            raise HTTPException(413, f"the body is larger than {limit} bytes")
    return bytes(body)


class Guard:
    """The check before everything else: the size of the headers, and the API key."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self.app = app
        self.key = None if api_key is None else _digest(b"Bearer " + api_key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        await (self.app if refusal is None else refusal)(scope, receive, send)

    def _refusal(self, scope: Scope) -> Response | None:
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            return error_response(431, f"the headers are larger than {MAX_HEADER_BYTES} bytes")
        if self.key is None or scope["path"] == OPEN_PATH or scope["path"] in page_paths():
            return None
        sent = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        # Digests of equal length are compared in constant time, so that the answer's delay tells nothing of the key.
        if hmac.compare_digest(_digest(sent), self.key):
            return None
        headers = {"WWW-Authenticate": "Bearer"}
        return error_response(401, "the API key is missing or wrong", code="invalid_api_key", headers=headers)


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
    return JSONResponse(body, status)


async def _on_busy(http: Request, error: Exception) -> Response:
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
    return error_response(503, "too many requests are waiting", code="overloaded", headers=headers)


async def _on_http_error(http: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return error_response(error.status_code, str(error.detail), headers=error.headers)


async def _on_gone(http: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


async def _on_defect(http: Request, error: Exception) -> Response:
    # The traceback is in the log.
    return error_response(500, "internal error")


HANDLERS = {
    PymllmError: _on_pymllm_error,
    Busy: _on_busy,
    HTTPException: _on_http_error,
    ClientDisconnect: _on_gone,
    Exception: _on_defect,
}
