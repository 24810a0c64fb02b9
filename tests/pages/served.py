"""The server that a page has started: one at a time, until the next one or the page's end."""

from __future__ import annotations

import contextlib
import fcntl
import re
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from .commands import reader_environment

PORT = 8000


class Server:
    """A `pymllm serve` of a page, on the port that it names."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115

    def start(self, command: str, folder: Path) -> None:
        """End the one before, run a command, and wait until it answers.  AssertionError where it ends."""
        self.stop()
        port = re.search(r"--port (\d+)", command)
        self._process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", f"exec {command}"],
            cwd=folder,
            env=reader_environment(),
            stdin=subprocess.DEVNULL,
            stdout=self._printed,
            stderr=self._printed,
        )
        while not _answers(int(port[1]) if port else PORT):
            if self._process.poll() is not None:
                self._printed.seek(0)
                raise AssertionError(f"{command} ended:\n{self._printed.read().decode()[-3000:]}")
            time.sleep(0.1)

    def stop(self) -> None:
        """End it as Ctrl+C does, and wait for its end."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(60)
            self._process = None


def _answers(port: int) -> bool:
    with contextlib.suppress(urllib.error.URLError, ConnectionError):
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10).status == 200
    return False


@contextlib.contextmanager
def one_server() -> Iterator[Server]:
    """Give a page the port that all pages name, for as long as it is tested."""
    with open(Path(tempfile.gettempdir()) / "pymllm-pages.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        server = Server()
        try:
            yield server
        finally:
            server.stop()
