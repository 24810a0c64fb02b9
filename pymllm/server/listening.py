"""The server around an app: uvicorn with our connections, as many files as it may open, and an end that comes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from pymllm.errors import RequestError
from pymllm.server.connections import Connection
from pymllm.server.traffic import Traffic

logger = logging.getLogger("pymllm")

# Connections that the kernel holds until they are accepted, and how many asyncio accepts before it does anything else:
# it would otherwise open files until there are none, before any connection is counted.
BACKLOG, ACCEPTED_TOGETHER = 2048, 16

# File descriptors that stay free for files and for what else a process opens.
SPARE_FILES = 64

# How long clients have to take the last events after the time to drain is over, and what still runs to end.
LAST_SECONDS = 2.0


def configure(app: FastAPI, *, verbose: bool = False, **settings: Any) -> uvicorn.Config:
    """Make uvicorn's configuration for an app of `create_app`.

    verbose: whether uvicorn's messages are logged that are no errors.  settings: more of uvicorn's own.
    """
    traffic: Traffic = app.state.traffic
    traffic.set_room(file_room())
    return uvicorn.Config(
        app,
        # It is h11's, which bounds the size of headers, as httptools does not.
        http=functools.partial(Connection, traffic=traffic),  # type: ignore[arg-type]
        ws="none",
        lifespan="off",
        backlog=ACCEPTED_TOGETHER,
        timeout_keep_alive=traffic.limits.idle_seconds,  # type: ignore[arg-type]
        # A line for each request that cannot be read would fill a disk, and a pipe that nobody reads.
        log_level="info" if verbose else "error",
        access_log=False,
        server_header=False,
        **settings,
    )


def file_room() -> int | None:
    """Raise the soft limit of open files to the hard one.  Returns how many more may be opened; None: unknown."""
    try:
        import resource
    except ImportError:
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    if soft == resource.RLIM_INFINITY:
        return None
    listing = Path("/proc/self/fd")
    return soft - SPARE_FILES - (len(list(listing.iterdir())) if listing.is_dir() else SPARE_FILES)


class DrainingServer(uvicorn.Server):
    """A server that finishes its requests on a signal, for so long, and stops at once on a second one.

    Until then it still listens, so that new requests get 503, and not a closed port.
    same_signal_seconds: within which two signals are one, that came twice.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        on_listening: Callable[[], None] = lambda: None,
        on_stopping: Callable[[], None] = lambda: None,
        *,
        same_signal_seconds: float = 0.0,
    ) -> None:
        super().__init__(config)
        self.same_signal_seconds, self._told_at = same_signal_seconds, 0.0
        self.on_listening, self.on_stopping = on_listening, on_stopping
        self.traffic: Traffic | None = getattr(getattr(config.app, "state", None), "traffic", None)
        self._stops_at: float | None = None
        self._silent_until = 0.0
        self._last_resort: threading.Timer | None = None

    def run(self, sockets: Any = None) -> None:
        try:
            super().run(sockets)
        finally:
            if self._last_resort is not None:
                self._last_resort.cancel()

    async def startup(self, sockets: Any = None) -> None:
        asyncio.get_running_loop().set_exception_handler(self._on_loop_error)
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(BACKLOG)
        self.on_listening()

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self._stops_at is not None:
            if time.monotonic() - self._told_at < self.same_signal_seconds:
                return
            # A plain exit would wait for the generating thread.
            os._exit(128 + sig)
        super().handle_exit(sig, frame)
        self.should_exit, self._told_at = False, time.monotonic()
        seconds = 0.0
        if self.traffic is not None:
            self.traffic.stopping = True
            seconds = self.traffic.limits.drain_seconds
        self._stops_at = time.monotonic() + seconds
        # Not here: the signal may have come while a line was written, and a stream cannot be written within itself.
        asyncio.get_running_loop().call_soon_threadsafe(self.on_stopping)

    async def on_tick(self, counter: int) -> bool:
        if self.traffic is not None:
            self.traffic.worker.pulse.look()
        if self._stops_at is not None and (self._seconds_left() <= 0 or not self._under_way()):
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: Any = None) -> None:
        """Close what listens, tell those whose answers are not finished, and leave nobody connected."""
        left = self._seconds_left()
        if self._stops_at is not None:
            # Threads that hang would keep the process.
            self._last_resort = threading.Timer(left + 5 * LAST_SECONDS, os._exit, [0])
            self._last_resort.daemon = True
            self._last_resort.start()
        if self._under_way() and self.traffic is not None:
            message = "the server has stopped before the answer was there"
            # At once: a step may take longer than the process has.
            self.traffic.worker.lose(RequestError(message, code="shutting-down"))
        ending = asyncio.ensure_future(super().shutdown(sockets))
        await asyncio.wait({ending}, timeout=max(left, LAST_SECONDS))
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await asyncio.wait({ending}, timeout=LAST_SECONDS)
        self.force_exit = True
        await ending

    def _on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log what the loop caught, but that no file can be opened only once a minute: asyncio says it very often."""
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE):
            loop.default_exception_handler(context)
        elif time.monotonic() >= self._silent_until:
            self._silent_until = time.monotonic() + 60
            logger.error("a connection cannot be accepted: %s", error)

    def _seconds_left(self) -> float:
        return 0.0 if self._stops_at is None else max(self._stops_at - time.monotonic(), 0.0)

    def _under_way(self) -> int:
        return len(self.server_state.tasks) if self.traffic is None else self.traffic.under_way
