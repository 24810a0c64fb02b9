"""Processes that this one starts as ranks: they end with it, and their last words are kept."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence

# How much of what a process has written to stderr is told when it has died.
LAST_LINES, LAST_WIDTH = 6, 300

PR_SET_PDEATHSIG = 1


class Child:
    """A process, started by a thread that lives as long as this process: some systems end a child with its thread."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            # A terminal's Ctrl+C is for the first process, which ends the others.
            start_new_session=True,
        )
        self._lines: deque[str] = deque(maxlen=LAST_LINES)
        self._reader = threading.Thread(target=self._read, name="rank-output", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for raw in self.process.stderr:
            line = raw.decode(errors="replace").rstrip("\n")
            if line.strip():
                self._lines.append(line[:LAST_WIDTH])
            with contextlib.suppress(OSError, ValueError, AttributeError):
                print(line, file=sys.stderr, flush=True)

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def describe_end(self, seconds: float = 1.0) -> str:
        """Say how the process has ended, and its last words; wait so long for that."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return "its connection has ended, but its process has not"
        self._reader.join(seconds)
        how = f"it was ended by {_signal_name(-code)}" if code < 0 else f"it has ended with code {code}"
        return f"{how}, after writing: {' | '.join(self._lines)}" if self._lines else how

    def wait(self, seconds: float) -> bool:
        """Wait until the process has ended.  Returns whether it has."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.ended

    def kill(self) -> None:
        """End the process, also one that is stopped."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.wait(5.0)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def is_stopped(process: subprocess.Popen[bytes]) -> bool:
    """Tell whether a child has been stopped (SIGSTOP), so that it can neither say anything nor notice anything."""
    if not hasattr(os, "waitid"):
        return False
    try:
        found = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return found is not None and found.si_code == os.CLD_STOPPED


def end_with_parent(parent: int) -> None:
    """Have the system end this process when its parent ends, also while it is stopped; where it cannot, do nothing.

    parent: the parent's process id; if that has gone already, this process ends here.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
