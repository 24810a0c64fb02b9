"""What answers on a server's socket while there is no server: 503, and why, to whatever is asked."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import threading

RETRY_AFTER_SECONDS = 5
READ_SECONDS = 2.0  # that a client has to send its headers, and to take the answer
MAX_HEADER_BYTES = 16 << 10
MOST = 64  # clients that are answered at a time; the others are closed
TICK = 0.1


class StandIn:
    """An answer to everybody who connects to `listener`.  why: what is said; None: nobody is answered."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.why: str | None = None
        self._thread: threading.Thread | None = None
        self._free = threading.BoundedSemaphore(MOST)

    def start(self, why: str) -> None:
        """Answer with this reason from now on."""
        self.why = why
        if self._thread is None:
            # It may be that no server has listened yet; and `accept` must not wait for a client that another takes.
            self.listener.listen(1024)
            self.listener.setblocking(False)
            self._thread = threading.Thread(target=self._run, name="stand-in", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Leave the socket to a server."""
        self.why = None
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while self.why is not None:
            if not select.select([self.listener], [], [], TICK)[0]:
                continue
            with contextlib.suppress(OSError):
                connection, _ = self.listener.accept()
                if self._free.acquire(blocking=False):
                    threading.Thread(target=self._answer, args=(connection,), daemon=True).start()
                else:
                    connection.close()

    def _answer(self, connection: socket.socket) -> None:
        try:
            with connection, contextlib.suppress(OSError):
                connection.settimeout(READ_SECONDS)
                asked = b""
                while b"\r\n\r\n" not in asked and len(asked) < MAX_HEADER_BYTES:
                    data = connection.recv(4096)
                    if not data:
                        return
                    asked += data
                connection.sendall(self._response(asked.startswith(b"HEAD ")))
                connection.shutdown(socket.SHUT_WR)
                # A socket that is closed with a body unread takes the answer away again.
                for _ in range(1024):
                    if not connection.recv(1 << 16):
                        return
        finally:
            self._free.release()

    def _response(self, head_only: bool) -> bytes:
        reason = self.why or "it is there again"
        message = f"the server is started anew: {reason}"
        error = {"message": message, "type": "server_error", "param": None, "code": "restarting"}
        body = json.dumps({"status": "unavailable", "reason": reason, "error": error}).encode()
        lines = (
            "HTTP/1.1 503 Service Unavailable",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            f"Retry-After: {RETRY_AFTER_SECONDS}",
            "Connection: close",
        )
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + (b"" if head_only else body)
