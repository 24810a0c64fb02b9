"""A parent for a server whose model is on several ranks: if a rank is lost, the whole server is started anew.

The parent has the socket, and nothing that can hang: no model, no torch. The server is its child: rank 0, which serves
and has the other ranks as its own children. While there is no server, the parent answers 503 and says why. The child
says a word every second; the parent ends one that is silent. Where the parent ends, so does the child.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from pymllm.parallel.away import Looks
from pymllm.parallel.children import end_with_parent, is_stopped
from pymllm.server.stand_in import StandIn

# How the child finds what it has from its parent: the numbers of its two sockets, and the parent's process id.
VARIABLE = "PYMLLM_SERVED"

COMMAND = (sys.executable, "-m", "pymllm")

# The exit code of a server that wants to be started anew.
RESTART = 75

PING_SECONDS = 1.0
SILENCE = 8.0  # seconds without a word of a server after which it counts as hung
START_SILENCE = 120.0  # likewise while it starts: to load torch's libraries takes long on a busy machine
FLUSH_SECONDS = 1.0  # that a server which is lost has to tell its clients
LEAVE_SECONDS = 5.0  # that it has to end by itself then
MOST_FAILURES = 3  # starts in a row that fail before the parent gives up
TICK = 0.2

# What the parent sends in place of a signal's number when it answers nobody any more.
ALONE = 0


class Supervisor:
    """The parent.  listener: bound, and listening once a server does.  arguments: of `pymllm`, that start the child."""

    def __init__(self, listener: socket.socket, arguments: Sequence[str]) -> None:
        self.listener, self.arguments = listener, arguments
        self.stand_in = StandIn(listener)
        self.server: _Server | None = None
        self.stopping: list[int] = []
        self.failures = 0
        self.has_served = False

    def run(self) -> int:
        """Keep a server until one ends because it was told to, or cannot start.  Returns the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        try:
            while True:
                code = self._serve()
                if code is not None:
                    return code
        finally:
            self.stand_in.stop()
            if self.server is not None:
                self.server.kill()

    def _serve(self) -> int | None:
        """Start a server and wait for its end.  Returns the exit code of the whole; None: another server is needed."""
        server = self.server = _Server(self.listener, self.arguments)
        for number in self.stopping:
            server.stop(number)
        watch = Looks()
        while True:
            for word in server.listen():
                if "ready" in word:
                    self.stand_in.stop()
                    server.stop(ALONE)
                if "serving" in word:
                    self.failures, self.has_served, server.serving = 0, True, True
                if "lost" in word:
                    # The next one starts while this one tells its clients.
                    self._stand_in_for(server, str(word["lost"]))
                    return None
            code = server.process.poll()
            if code is not None:
                return self._after(server, code)
            if watch.missed():
                server.heard = time.monotonic()
            silent = time.monotonic() - server.heard
            if silent > (SILENCE if server.serving or is_stopped(server.process) else START_SILENCE):
                server.kill()
                return self._after(server, RESTART, f"the server was silent for {silent:.0f} seconds")

    def _after(self, server: _Server, code: int, why: str = "") -> int | None:
        """Decide what follows the end of a server.  why: it has ended; by default what its exit code says."""
        if self.stopping or code == 0:
            return code if code >= 0 else 128 - code
        if not server.serving:
            self.failures += 1
            if not self.has_served or self.failures >= MOST_FAILURES:
                return code if code > 0 else 1
            time.sleep(min(2.0 ** (self.failures - 1), 5.0))
        how = f"the server has ended with {'code' if code > 0 else 'signal'} {abs(code)}"
        self._stand_in_for(server, why or how)
        return None

    def _stand_in_for(self, server: _Server, why: str) -> None:
        if self.stand_in.why is None or not server.serving:
            print(f"The server is started anew: {why}", file=sys.stderr, flush=True)
        if self.has_served:
            self.stand_in.start(why)
        threading.Thread(target=server.see_off, name="farewell", daemon=True).start()

    def _stop(self, number: int, frame: Any) -> None:
        self.stopping.append(number)
        if self.server is not None:
            self.server.stop(number)


class _Server:
    """A child.  heard: when it said something last.  serving: whether it has ever served."""

    def __init__(self, listener: socket.socket, arguments: Sequence[str]) -> None:
        self.channel, theirs = socket.socketpair()
        with theirs:
            fds = (listener.fileno(), theirs.fileno())
            self.process = subprocess.Popen(
                [*COMMAND, *arguments],
                env={**os.environ, VARIABLE: f"{fds[0]}:{fds[1]}:{os.getpid()}"},
                pass_fds=fds,
                # A terminal's Ctrl+C comes to it through its parent.
                start_new_session=True,
            )
        self.heard, self.serving, self._came = time.monotonic(), False, b""

    def listen(self) -> list[dict[str, Any]]:
        """Wait a moment for what the child says."""
        if not select.select([self.channel], [], [], TICK)[0]:
            return []
        with contextlib.suppress(ConnectionError):
            data = self.channel.recv(1 << 16)
            self.heard = time.monotonic() if data else self.heard
            if not data:
                time.sleep(TICK)
            *lines, self._came = (self._came + data).split(b"\n")
            return [json.loads(line) for line in lines if line]
        return []

    def stop(self, number: int) -> None:
        """Have the child take a signal."""
        with contextlib.suppress(OSError):
            self.channel.sendall(f"{number}\n".encode())

    def see_off(self) -> None:
        """Wait until the child has ended, and end it if it does not."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(LEAVE_SECONDS)
        self.kill()

    def kill(self) -> None:
        """End the child, and with it its own."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        self.channel.close()


class Served:
    """The child's side: what it has from its parent.

    listener: the socket to serve on.  lost: whether this server is about to be replaced.
    """

    def __init__(self, told: str) -> None:
        listener, channel, parent = map(int, told.split(":"))
        self.listener, self.channel = socket.socket(fileno=listener), socket.socket(fileno=channel)
        self.parent, self.lost = parent, False
        self._saying, self._alone = threading.Lock(), threading.Event()

    @classmethod
    def from_environment(cls) -> Served | None:
        """Return what a parent has told this process; None: it has no parent of this kind."""
        told = os.environ.pop(VARIABLE, None)
        return None if told is None else cls(told)

    def start(self) -> None:
        """Say a word every second from now on, take signals, and end with the parent.  Call it in the main thread."""
        end_with_parent(self.parent)
        for work in (self._live, self._obey):
            threading.Thread(target=work, name="parent", daemon=True).start()

    def say(self, **word: Any) -> None:
        """Tell the parent something; where it has gone, end."""
        try:
            with self._saying:
                self.channel.sendall(json.dumps(word).encode() + b"\n")
        except OSError:
            os._exit(1)

    def take_over(self) -> None:
        """Have the parent answer nobody any more; who connects from now on waits for this server."""
        self.say(ready=True)
        self._alone.wait(SILENCE)

    def replace(self, why: str, tell_clients: Callable[[], None]) -> None:
        """End this server and have another one started.  tell_clients: has all clients be told."""
        self.lost = True
        self.say(lost=why)
        tell_clients()
        time.sleep(FLUSH_SECONDS)
        os._exit(RESTART)

    def _live(self) -> None:
        while True:
            self.say(ping=True)
            time.sleep(PING_SECONDS)

    def _obey(self) -> None:
        came = b""
        while data := self.channel.recv(64):
            *numbers, came = (came + data).split(b"\n")
            for number in map(int, numbers):
                if number == ALONE:
                    self._alone.set()
                else:
                    os.kill(os.getpid(), number)
        os._exit(1)
