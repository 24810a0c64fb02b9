"""A follower's end of its connection to rank 0: it waits for what rank 0 says, and ends with it."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from pymllm.errors import RankError
from pymllm.parallel.away import Looks
from pymllm.parallel.leader import JOIN_SECONDS, PING_SECONDS, SILENCE
from pymllm.parallel.link import Link, Message

# The exit code of a follower whose rank 0 has gone.
LOST = 3

# Seconds between two tries to reach rank 0, which may not be there yet.
RETRY_SECONDS = 0.2


class Led:
    """The connection of rank `rank` of `size` to rank 0.

    Whatever the process does meanwhile, it ends when rank 0 ends or is silent: a thread that waits in a collective
    cannot be told otherwise.
    """

    def __init__(self, rank: int, size: int, host: str, port: int, key: str) -> None:
        self.rank, self.size = rank, size
        self._link = _reach(rank, size, host, port)
        self._came: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._ending = False
        self.tell({"is": "hello", "rank": rank, "size": size, "key": key})
        for work in (self._read, self._live):
            threading.Thread(target=work, name="rank-link", daemon=True).start()

    def next(self) -> Message:
        """Wait for the next message.  RankError if rank 0 does not let this rank in."""
        message, integers = self._came.get()
        if message.get("is") == "refused":
            raise RankError(
                f"rank 0 has refused rank {self.rank} of {self.size}: {message.get('reason')}",
                code="rank-refused",
                fix="Start all ranks with the same options.",
            )
        return message, integers

    def tell(self, message: Mapping[str, Any]) -> None:
        """Tell rank 0 something.  If it has gone, this process is about to end."""
        with contextlib.suppress(OSError):
            self._link.send(message)

    def close(self) -> None:
        """End the connection; this process goes on."""
        self._ending = True
        self._link.close()

    def _read(self) -> None:
        try:
            while not self._ending:
                for message, integers in self._link.receive():
                    # What comes after these words is the end of the connection, as it should be.
                    self._ending = (
                        self._ending or message.get("do") == "end" or message.get("is") == "refused"
                    )
                    self._came.put((message, integers))
        except EOFError:
            self._die("rank 0 has ended")
        except (OSError, RankError) as error:
            self._die(str(error))

    def _live(self) -> None:
        watch = Looks()
        while not self._ending:
            with contextlib.suppress(OSError):
                self._link.ping()
            if watch.missed():
                self._link.heard = time.monotonic()
            silent = time.monotonic() - self._link.heard
            if silent > SILENCE:
                self._die(f"rank 0 has been silent for {silent:.0f} seconds")
            time.sleep(PING_SECONDS)

    def _die(self, why: str) -> None:
        if self._ending:
            return
        with contextlib.suppress(OSError, ValueError):
            print(f"rank {self.rank} of {self.size} ends: {why}", file=sys.stderr, flush=True)
        os._exit(LOST)


def _reach(rank: int, size: int, host: str, port: int) -> Link:
    """Connect to rank 0, which may come later.  RankError if it does not come."""
    deadline = time.monotonic() + JOIN_SECONDS
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=SILENCE)
            connection.settimeout(None)
            return Link(connection)
        except OSError as error:
            if time.monotonic() > deadline:
                raise RankError(
                    f"rank {rank} of {size} cannot reach rank 0",
                    code="rank-timeout",
                    expected=f"rank 0 at {host} port {port}",
                    found=str(error),
                    fix="Start node 0, and check --master-addr and --master-port.",
                ) from None
            time.sleep(RETRY_SECONDS)
