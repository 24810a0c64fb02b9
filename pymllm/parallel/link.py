"""Messages between rank 0 and a rank that follows it, over TCP: JSON and integers, nothing that can run code.

A message is a head of two numbers, the bytes of the JSON and how many integers follow; the JSON, an object; and the
integers, 8 bytes each, the lowest first.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pymllm.errors import RankError

HEAD = struct.Struct("<IQ")
MAX_JSON_BYTES = 64 << 20
MAX_INTEGERS = 1 << 27
PING = {"is": "ping"}

Message = tuple[dict[str, Any], "np.ndarray[Any, Any]"]


class Link:
    """One end of a connection.  heard: when something came last, by `time.monotonic`."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection = connection
        self.heard = time.monotonic()
        self._came = bytearray()
        self._sending = threading.Lock()

    def fileno(self) -> int:
        return self.connection.fileno()

    def send(self, message: Mapping[str, Any], integers: Sequence[int] | np.ndarray[Any, Any] = ()) -> None:
        """Send a message.  OSError if the other end has gone."""
        self.send_bytes(encode(message, integers))

    def send_bytes(self, data: bytes) -> None:
        """Send a message that `encode` has written.  OSError if the other end has gone."""
        with self._sending:
            self.connection.sendall(data)

    def ping(self) -> None:
        """Let the other end hear of this one, unless a message is on its way: never wait for the other end."""
        if self._sending.acquire(blocking=False):
            try:
                with contextlib.suppress(BlockingIOError):
                    # So few bytes go whole or not at all.
                    self.connection.send(encode(PING), socket.MSG_DONTWAIT)
            finally:
                self._sending.release()

    def receive(self, most: int = MAX_JSON_BYTES, most_integers: int = MAX_INTEGERS) -> Iterator[Message]:
        """Wait until something comes.  Yields the messages that are whole; pings are left out.

        most: bytes of JSON.  most_integers: how many may follow it.
        Raises EOFError if the other end has gone, RankError for what is no message.
        """
        try:
            data = self.connection.recv(1 << 20)
        except ConnectionError:
            data = b""
        if not data:
            raise EOFError
        self.heard = time.monotonic()
        self._came += data
        while (found := decode(self._came, most, most_integers)) is not None:
            if found[0] != PING:
                yield found

    def close(self) -> None:
        """End the connection, also for a thread that waits in it."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()


def encode(message: Mapping[str, Any], integers: Sequence[int] | np.ndarray[Any, Any] = ()) -> bytes:
    """Write a message as bytes."""
    text, words = json.dumps(message).encode(), np.asarray(integers, dtype="<i8")
    return HEAD.pack(len(text), words.size) + text + words.tobytes()


def decode(came: bytearray, most: int = MAX_JSON_BYTES, most_integers: int = MAX_INTEGERS) -> Message | None:
    """Take the first message off what came.  None: it is not whole yet.  RankError for what is no message."""
    if len(came) < HEAD.size:
        return None
    text, words = HEAD.unpack_from(came)
    if text > most or words > most_integers:
        raise _no_message(f"a head that announces {text} bytes and {words} integers")
    end = HEAD.size + text + 8 * words
    if len(came) < end:
        return None
    raw = bytes(came[HEAD.size : end])
    del came[:end]
    try:
        message = json.loads(raw[:text])
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise _no_message("something else than a JSON object")
    return message, np.frombuffer(raw, dtype="<i8", offset=text)


def _no_message(found: str) -> RankError:
    return RankError(
        "another rank, or another program, has sent something that is no message",
        code="rank-message",
        expected="a JSON object and integers, as pymllm writes them",
        found=found,
        fix="Run the same version of pymllm on all ranks, and let nobody else connect to their port.",
    )
