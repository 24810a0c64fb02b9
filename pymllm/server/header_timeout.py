"""uvicorn's HTTP/1.1 protocol, with a time limit for headers, and JSON for a request that cannot be read."""

from __future__ import annotations

import asyncio
import json
import sys
from http import HTTPStatus

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from pymllm.server.gate import error_body

HEADER_SECONDS = 10.0


class HeaderTimeoutProtocol(H11Protocol):
    """A connection that answers 408 and closes if a request's headers take too long.

    They must be there HEADER_SECONDS after the connection was made or, for a later request, after their first byte.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            # The headers are there, or what came are none.
            self._stop_waiting()
        elif self.conn.trailing_data[0] and self._deadline is None:
            # The next request's headers have begun.
            self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait_for_headers(self) -> None:
        self._deadline = self.loop.call_later(HEADER_SECONDS, self._too_slow)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        self._deadline = None
        self._refuse(408, f"the headers did not arrive within {HEADER_SECONDS:g} seconds")

    def send_400_response(self, msg: str) -> None:
        """Refuse a request that cannot be read; uvicorn calls this while it handles h11's error."""
        if getattr(sys.exc_info()[1], "error_status_hint", 400) == 431:
            self._refuse(431, "the headers are too large")
        else:
            self._refuse(400, "this is no HTTP/1.1 request")

    def _refuse(self, status: int, message: str) -> None:
        body = json.dumps(error_body(status, message))
        self.transport.write(
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
            "Content-Type: application/json\r\nConnection: close\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        self.transport.close()
