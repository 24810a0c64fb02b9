"""uvicorn's HTTP/1.1 connection with limits of time and number, and JSON for a request that cannot be read."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import uuid
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from pymllm.server.gate import error_body
from pymllm.server.traffic import CONNECTIONS, REASONS_BY_STATUS, WRITE, Traffic

# How many unsent bytes the kernel holds for a client; what it holds beyond that, a client that reads slowly costs us.
UNSENT_BYTES = 128 << 10

# Of headers at most, uvicorn's own bound; `header_bytes` of the limits is lower.
HEADER_BYTES = 1 << 16

# A client that takes at least so much in the time of the write timeout is slow, but there.
PROGRESS_BYTES = 16 << 10

# A connection that has just come, or just had an answer, is not closed to make room for others while there is some.
QUIET_SECONDS = 1.0

# Of a body that was refused, so many times of what one may have is still read: a client that sends all of its body
# before it looks for an answer gets one, unless the body is endless.
DISCARDED_BODIES = 4

# The states of a client whose request is there.
AFTER_BODY = (h11.DONE, h11.MIGHT_SWITCH_PROTOCOL)

# How many chunks a body may come in, and how many parts of requests are read before others have their turn: a chunk of
# a byte costs as much to read as one of thousands.
MOST_CHUNKS, EVENTS_A_TURN = 1 << 14, 64


class RequestReader(h11.Connection):
    """h11's reader of requests, which takes a rest after so many events, and refuses a body of too many chunks.

    rest: called when it takes one; until `go_on` it has no further event.
    """

    def __init__(self, most_bytes: int, rest: Callable[[], None]) -> None:
        super().__init__(h11.SERVER, most_bytes)
        self._rest = rest
        self._left, self._chunks, self.rests = EVENTS_A_TURN, 0, False

    def go_on(self) -> None:
        """End the rest."""
        self._left, self.rests = EVENTS_A_TURN, False

    def next_event(self) -> Any:
        if self._left <= 0:
            if not self.rests:
                self.rests = True
                self._rest()
            return h11.NEED_DATA
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunks = 0
        elif isinstance(event, h11.Data):
            self._left -= 1
            self._chunks += event.chunk_start
            if self._chunks > MOST_CHUNKS:
                raise h11.RemoteProtocolError("too many chunks", error_status_hint=413)
        return event


class Connection(H11Protocol):
    """A connection whose client has so long to send its headers, and to take what was written.

    Headers must be there `header_seconds` after the connection was made or, for a later request, after their first
    byte: else the client gets 408. Unsent bytes are waited for as long as the client goes on taking some.
    When too many connections are open, the one that has been idle for longest is closed; where none is idle, the
    requests of a new one are refused, but for /health.
    """

    _deadline: asyncio.TimerHandle | None = None
    _write_deadline: asyncio.TimerHandle | None = None
    _discard_deadline: asyncio.TimerHandle | None = None

    def __init__(self, *arguments: Any, traffic: Traffic, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.traffic, self.limits = traffic, traffic.limits
        self.quiet_since = 0.0
        self._discarded = 0
        self.conn: RequestReader = RequestReader(HEADER_BYTES, self._rest)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Any byte that the kernel does not take pauses the writing, and starts the clock.
        transport.set_write_buffer_limits(0)
        bound_unsent(transport.get_extra_info("socket"))
        self.quiet_since = self.loop.time()
        self._wait_for_headers()
        self.traffic.connections = len(self.connections)
        if len(self.connections) > self.traffic.most_connections:
            self._make_room()

    def _rest(self) -> None:
        self.flow.pause_reading()
        self.loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        self.conn.go_on()
        if not self.transport.is_closing():
            self.flow.resume_reading()
            self.data_received(b"")

    def data_received(self, data: bytes) -> None:
        # Without data, h11 takes it for the end of all of them.
        super().data_received(data) if data else self.handle_events()
        state = self.conn.their_state
        if state is not h11.IDLE:
            # The headers are there, or what came are none.
            self._stop_waiting()
        elif self.conn.trailing_data[0] and self._deadline is None:
            # The next request's headers have begun.
            self._wait_for_headers()
        if state is h11.SEND_BODY and self.is_idle:
            # The answer is there already, and what still comes is thrown away, but not for ever.
            self._discarded += len(data)
            if self._discard_deadline is None:
                self._discard_deadline = self.loop.call_later(self.limits.body_seconds, self.transport.abort)
            if self._discarded > DISCARDED_BODIES * self.limits.body_bytes:
                self.transport.abort()
        if state in AFTER_BODY and len(self.conn.trailing_data[0]) < self.limits.header_bytes:
            # uvicorn stops to read when a next request comes early, and would not see that the client leaves.
            self.flow.resume_reading()

    def on_response_complete(self) -> None:
        self.quiet_since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait_for_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        stop(self._write_deadline)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        stop(self._write_deadline)
        stop(self._discard_deadline)
        super().connection_lost(exc)
        self.traffic.connections = len(self.connections)

    @property
    def is_idle(self) -> bool:
        """True if no request of the connection is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def give_up(self) -> None:
        """Close the connection, unsent bytes or not."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()

    def _make_room(self) -> None:
        full = len(self.connections) > self.traffic.ceiling
        latest = self.loop.time() - (0.0 if full else QUIET_SECONDS)
        others = (one for one in self.connections if isinstance(one, Connection) and one is not self)
        idle = [one for one in others if one.is_idle and one.quiet_since <= latest]
        if idle:
            min(idle, key=lambda one: one.quiet_since).give_up()
        elif full:
            self._refuse(503, "too many connections are open", CONNECTIONS)
        else:
            self.app_state = {**self.app_state, "surplus": True}

    def _wait_for_headers(self) -> None:
        self._deadline = self.loop.call_later(self.limits.header_seconds, self._too_slow)

    def _stop_waiting(self) -> None:
        stop(self._deadline)
        self._deadline = None

    def _too_slow(self) -> None:
        self._deadline = None
        self._refuse(408, f"the headers did not arrive within {self.limits.header_seconds:g} seconds")

    def _wait_for_reader(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        self._write_deadline = self.loop.call_later(self.limits.write_seconds, self._check_reader, unsent)

    def _check_reader(self, before: int) -> None:
        if before - self.transport.get_write_buffer_size() >= PROGRESS_BYTES:
            self._wait_for_reader()
            return
        self.traffic.refused[WRITE] += 1
        self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Refuse a request that cannot be read; uvicorn calls this while it handles h11's error."""
        status = getattr(sys.exc_info()[1], "error_status_hint", 400)
        if status == 431:
            self._refuse(431, "the headers are too large")
        elif status == 413:
            self._refuse(413, f"the body comes in more than {MOST_CHUNKS} chunks")
        else:
            self._refuse(400, "this is no HTTP/1.1 request")

    def _refuse(self, status: int, message: str, reason: str | None = None) -> None:
        self.traffic.refused[reason or REASONS_BY_STATUS[status]] += 1
        code = "overloaded" if status == 503 else None
        body = json.dumps(error_body(status, message, code=code))
        retry = f"Retry-After: {self.traffic.retry_after()}\r\n" if status == 503 else ""
        self.transport.write(
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
            f"Content-Type: application/json\r\nConnection: close\r\nX-Request-Id: {uuid.uuid4().hex}\r\n{retry}"
            f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        self.transport.close()


def stop(timer: asyncio.TimerHandle | None) -> None:
    """Cancel a timer, if there is one."""
    if timer is not None:
        timer.cancel()


def bound_unsent(connection: socket.socket | None) -> None:
    """Have the kernel take no more than UNSENT_BYTES that it cannot send yet, where it can be told so."""
    option = getattr(socket, "TCP_NOTSENT_LOWAT", None)
    if connection is not None and option is not None:
        try:
            connection.setsockopt(socket.IPPROTO_TCP, option, UNSENT_BYTES)
        except OSError:
            return  # a socket of another kind
