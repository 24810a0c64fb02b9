"""Processes that do work of which nobody knows how long it takes, or how much memory: ended at a limit, and replaced.

The programs are in children/. A process is a new interpreter, never a fork of this one, which has threads.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from pymllm.errors import ConfigError, escaped

PROGRAM = Path(__file__).parent / "children" / "program.py"

# Characters of an error text that is not ours.
MOST_SHOWN = 1000

# Waited for an interpreter to start, on a machine that may be very busy.
START_SECONDS = 60.0

# What an interpreter may need of the environment; the rest, keys of services say, is not for it.
ENVIRONMENT = (
    *(
        "PATH",
        "LD_LIBRARY_PATH",
        "DYLD_LIBRARY_PATH",
        "SYSTEMROOT",
        "TZ",
        "TZDIR",
        "LANG",
        "LC_ALL",
        "LC_TIME",
    ),
    *("TMPDIR", "TEMP", "TMP"),
)


def encoded(request: Mapping[str, Any]) -> bytes:
    """Write a request for a process.  Raises TypeError, ValueError or RecursionError for what JSON cannot say."""
    return json.dumps(request, default=_plain_value).encode("ascii")


def _plain_value(value: Any) -> Any:
    """Return what stands for a value that JSON has not: its items, or the name of its type, as transformers has it."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return list(value)
    return f"<{type(value).__name__}>"


def readable(text: str) -> str:
    """Write what a process says for a terminal: escape what does not print, and cut what is long."""
    shown = text if len(text) <= MOST_SHOWN else text[:MOST_SHOWN] + " ..."
    return escaped(shown)


class Stopped(Exception):
    """The end of a process at a limit, or by a crash; the message says which.

    always: whether the same request would end the same way again, however busy the machine is.
    """

    def __init__(self, why: str, always: bool = False) -> None:
        super().__init__(why)
        self.always = always


class _Process:
    """A running program.  ask: sends it a request, and waits for the answer."""

    def __init__(self, command: Sequence[str]) -> None:
        inherited = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**inherited, "TOKENIZERS_PARALLELISM": "false"},
        )
        self.late = False

    def ask(self, request: bytes, seconds: float) -> dict[str, Any]:
        """Return the answer to a request of `encoded`.  Raises Stopped without one in `seconds` of the clock."""
        watch = threading.Timer(seconds, self._end_late)
        watch.daemon = True
        watch.start()
        try:
            self._send(request)
            return self._receive()
        except (OSError, EOFError, ValueError):
            self.end()
            raise self._why() from None
        finally:
            watch.cancel()

    def _send(self, request: bytes) -> None:
        assert self.process.stdin is not None
        if request:
            self.process.stdin.write(len(request).to_bytes(8, "big"))
            self.process.stdin.write(request)
            self.process.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        size = int.from_bytes(_read(self.process.stdout, 8), "big")
        return json.loads(_read(self.process.stdout, size))

    def _end_late(self) -> None:
        self.late = True
        self.process.kill()

    def end(self) -> None:
        """End the process, and wait until it has."""
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
        self.process.wait()

    def _why(self) -> Stopped:
        code = self.process.returncode
        out_of_time = code in {-getattr(signal, name, 0) for name in ("SIGPROF", "SIGXCPU")}
        if self.late or out_of_time:
            return Stopped("it took too long", out_of_time)
        if code < 0:
            return Stopped(f"it crashed ({signal.Signals(-code).name})")
        return Stopped(f"its process ended with code {code}")


def _read(source: IO[bytes], size: int) -> bytes:
    data = source.read(size)
    if len(data) < size:
        raise EOFError
    return data


class Program:
    """A module of children/, and processes that run it.

    packages: what the module imports that is not Python's own.  memory: what a process may have, in bytes.
    kept: how many processes stay when there is nothing to do, so that the next request need not wait for a start.
    """

    def __init__(self, module: str, packages: Sequence[str], memory: int, kept: int) -> None:
        self.module, self.packages, self.memory, self.kept = module, packages, memory, kept
        self._forget()
        atexit.register(self.close)
        if hasattr(os, "register_at_fork"):
            # A fork of this process would share the pipes of its children.
            os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[_Process] = []

    @contextlib.contextmanager
    def process(self) -> Iterator[_Process]:
        """Take an idle process, or start one; after the block it is idle again, unless it failed."""
        with self._lock:
            taken = self._idle.pop() if self._idle else None
        if taken is not None and taken.process.poll() is not None:
            # Ended from outside, while it waited.
            taken.end()
            taken = None
        process, keep = self._start() if taken is None else taken, True
        try:
            yield process
        except BaseException as error:
            # Whoever refuses an answer has had it.
            keep = isinstance(error, Exception) and not isinstance(error, Stopped)
            raise
        finally:
            with self._lock:
                keep = keep and len(self._idle) < self.kept and not process.late
                if keep:
                    self._idle.append(process)
            if not keep:
                process.end()

    def close(self) -> None:
        """End the idle processes."""
        with self._lock:
            idle, self._idle = self._idle, []
        for process in idle:
            process.end()

    def _start(self) -> _Process:
        if not sys.executable:
            raise ConfigError(
                "there is no Python interpreter to start",
                code="interpreter",
                expected="the path of one in sys.executable",
            )
        # Isolated, and without `site`, which runs what any package has put there; packages are found by their folders.
        command = [sys.executable, "-I", "-S", str(PROGRAM), self.module, str(self.memory)]
        process = _Process([*command, *dict.fromkeys(map(_folder, self.packages))])
        try:
            process.ask(b"", START_SECONDS)
        except Stopped as stopped:
            raise ConfigError(
                f"the process for {self.module} does not start: {stopped}",
                code="interpreter",
                file=sys.executable,
                expected=f"an interpreter that imports {', '.join(self.packages)}",
            ) from None
        return process


def _folder(package: str) -> str:
    """Return the folder in which a package lies."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ConfigError(f"the package {package!r} is not installed", code="interpreter")
    return str(Path(found.origin).parent.parent)
