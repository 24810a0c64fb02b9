"""Keys and errors as Anthropic's clients know them, around an application that speaks OpenAI's way."""

from __future__ import annotations

import json
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PATH = "/v1/messages"
# The header that Anthropic's clients send with every request.
VERSION = "anthropic-version"

# What a status is called; those below 500 that are not here are invalid_request_error, and others api_error.
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
# Anthropic's status for a server that has too much to do.
OVERLOADED = 529


class AnthropicWords:
    """The layer around all that refuses requests.

    A key may come as `x-api-key`. The errors of /v1/messages, and of every request with Anthropic's version header,
    are of Anthropic's shape.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if "x-api-key" in headers and "authorization" not in headers:
            key = headers["x-api-key"].encode("latin-1")
            # Not in a copy: what lies outside finds the route in this scope.
            scope["headers"] = [*scope["headers"], (b"authorization", b"Bearer " + key)]
        if not speaks_anthropic(scope["path"]) and VERSION not in headers:
            await self.app(scope, receive, send)
            return
        translator = _Translator(send, scope.get("state", {}).get("request_id"))
        try:
            await self.app(scope, receive, translator.send)
        except Exception:
            # What is outside of this layer would answer in OpenAI's words; it logs the error.
            if not translator.started:
                await translator.refuse(500, "internal error")
            raise


class _Translator:
    """A response on its way to the client.

    request_id: of the request; None: it has none.  started: whether the status is known.
    """

    def __init__(self, send: Send, request_id: str | None) -> None:
        self._send, self.request_id = send, request_id
        self.started = False
        self._held: Message | None = None
        self._body = bytearray()

    async def send(self, message: Message) -> None:
        """Pass a message of the response on; those of an error are held until its body is whole."""
        if message["type"] == "http.response.start":
            self.started = True
            headers = MutableHeaders(raw=list(message["headers"]))
            if self.request_id is not None:
                # As Anthropic's clients call it.
                headers["request-id"] = self.request_id
            message = {**message, "headers": headers.raw}
            if message["status"] >= 400 and headers.get("content-type", "").startswith("application/json"):
                self._held = message
                return
        elif self._held is not None and message["type"] == "http.response.body":
            self._body += message.get("body", b"")
            if message.get("more_body"):
                return
            await self._translate(self._held)
            self._held = None
            return
        await self._send(message)

    async def refuse(self, status: int, message: str) -> None:
        """Send an error as the whole response."""
        headers = [(b"content-type", b"application/json")]
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        body = json.dumps({"error": {"message": message}}).encode()
        await self.send({"type": "http.response.body", "body": body})

    async def _translate(self, start: Message) -> None:
        status = start["status"]
        headers = MutableHeaders(raw=start["headers"])
        told = anthropic_error(status, json.loads(bytes(self._body)), self.request_id)
        body = json.dumps(told, ensure_ascii=False).encode()
        headers["content-length"] = str(len(body))
        await self._send({**start, "status": OVERLOADED if status == 503 else status, "headers": headers.raw})
        await self._send({"type": "http.response.body", "body": body})


def speaks_anthropic(path: str) -> bool:
    """Tell whether a path is one of Anthropic's API."""
    return path == PATH or path.startswith(f"{PATH}/")


def anthropic_error(status: int, body: Any, request_id: str | None = None) -> dict[str, Any]:
    """Return OpenAI's error object in Anthropic's words."""
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    told: dict[str, Any] = {"type": "error", "error": {"type": kind, "message": message or str(status)}}
    if isinstance(error, dict) and error.get("code"):
        told["error"]["details"] = {"error_code": error["code"]}
    return told if request_id is None else {**told, "request_id": request_id}
