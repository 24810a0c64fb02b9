"""The requests of one app: how many are under way, what was refused and why, and whether new ones are taken."""

from __future__ import annotations

import math
from collections import Counter

from pymllm.asynchronous.worker import Worker
from pymllm.server.limits import Limits

# What a refused client is told while nothing is known of the line, and the bounds of what it is told, in seconds.
RETRY_SECONDS, LEAST_RETRY, MOST_RETRY = 5, 1, 60

# Connections beyond those that may be open, whose requests are read, as one may be for /health, and refused.
SURPLUS = 1024

# Why a request was not answered, by its status; those of 503 say it themselves.
REASONS_BY_STATUS = {
    400: "bad_request",
    401: "no_key",
    403: "foreign_origin",
    404: "not_found",
    405: "method",
    408: "too_slow",
    413: "body_too_large",
    431: "headers_too_large",
}
LINE_FULL, READING, CONNECTIONS, BODIES = "line_full", "reading", "connections", "bodies"
STOPPING, UNHEALTHY, OTHER, WRITE = "stopping", "unhealthy", "other", "not_read"
REASONS = (
    *REASONS_BY_STATUS.values(),
    *(LINE_FULL, READING, CONNECTIONS, BODIES, STOPPING, UNHEALTHY, OTHER, WRITE),
)
METHODS = ("GET", "HEAD", "POST", "OPTIONS")


class Traffic:
    """The state that the parts of one app share of its requests.

    under_way: requests that hold memory: all but those of open paths.  arriving: bytes of bodies that are being
    received.  stopping: whether a signal to stop has come.
    connections: how many are open.  most_connections: of more, idle ones are closed.  ceiling: of more, new ones are
    refused without a word being read.
    answered: requests by method, path (as the route spells it) and status.  refused: by reason.
    """

    def __init__(self, limits: Limits, worker: Worker) -> None:
        self.limits, self.worker = limits, worker
        self.under_way = self.arriving = self.connections = 0
        self.most_connections = limits.connections
        self.ceiling = limits.connections + SURPLUS
        self.stopping = False
        self.answered: Counter[tuple[str, str, int]] = Counter()
        self.refused: Counter[str] = Counter(dict.fromkeys(REASONS, 0))

    def set_room(self, files: int | None) -> None:
        """Have no more connections than files may be opened; None: any number."""
        if files is not None:
            self.ceiling = max(min(self.ceiling, files), 2)
            self.most_connections = min(self.limits.connections, max(self.ceiling * 3 // 4, 1))

    def why_refused(self, surplus: bool = False) -> tuple[str, str] | None:
        """Return the reason, as a label and in words, for which no request is taken now, or None.

        surplus: whether the request's connection is one too many.
        """
        if self.stopping:
            return STOPPING, "the server is stopping"
        if surplus:
            return CONNECTIONS, "too many connections are open"
        if self.under_way >= self.worker.places.capacity + self.limits.reading:
            return READING, "too many requests are under way"
        unhealthy = self.worker.why_not_healthy()
        return None if unhealthy is None else (UNHEALTHY, unhealthy)

    def why_not_healthy(self) -> str | None:
        """Return why /health is not well, or None."""
        return "the server is stopping" if self.stopping else self.worker.why_not_healthy()

    def retry_after(self) -> str:
        """Return what a refused client is told to wait, in whole seconds."""
        told = self.limits.retry_after
        if told is None:
            told = self.worker.places.seconds_of_line()
            told = RETRY_SECONDS if told is None else min(max(told, LEAST_RETRY), MOST_RETRY)
        return str(math.ceil(told))

    def note_answer(self, method: str, path: str, status: int, reason: str | None = None) -> None:
        """Count a request.  path: as a route spells it.  reason: why it was refused; None: the status says so."""
        self.answered[method if method in METHODS else OTHER, path, status] += 1
        if status < 400 or (reason is None and status == 499):
            return
        self.refused[reason or REASONS_BY_STATUS.get(status, OTHER)] += 1
