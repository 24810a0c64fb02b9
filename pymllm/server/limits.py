"""What clients may take of the server, in counts, bytes and seconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of one server; each has a flag of `pymllm serve`, or says why not.

    connections: how many may be open; the process's file descriptors may allow fewer.
    reading: how many requests may be under way beyond those that have a place in the line: they are being received,
    read, encoded or refused.
    body_bytes: of one body.  arriving_bytes: of all bodies that are being received; 64 of the largest.
    header_bytes: of all headers of a request; h11 ends a connection at 64 KiB anyway.
    header_seconds, body_seconds: how long a client may take to send these.
    idle_seconds: how long a connection stays open after an answer.
    write_seconds: how long a client may take to receive what was written.
    pieces: how many pieces of one streamed answer may wait for its client.
    ping_seconds: after how long without a piece a stream sends a comment; 0: never.
    drain_seconds: how long requests may go on after a signal to stop.
    step_seconds: how long a step may take until /health says so; None: it follows from the steps so far.
    retry_after: what a refused client is told, in seconds; None: it follows from the line and its speed.
    """

    connections: int = 2048
    reading: int = 256
    body_bytes: int = 4 << 20
    header_bytes: int = 16 << 10
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    idle_seconds: float = 15.0
    write_seconds: float = 30.0
    pieces: int = 2048
    ping_seconds: float = 5.0
    drain_seconds: float = 30.0
    step_seconds: float | None = None
    retry_after: float | None = None

    @property
    def arriving_bytes(self) -> int:
        return 64 * self.body_bytes
