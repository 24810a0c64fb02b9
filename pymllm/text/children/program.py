"""The process that does bounded work for another: it reads requests from stdin and writes answers to stdout.

It is started by its file's path, with the name of a module of this folder, a limit on memory in bytes, and the folders
of the packages that the module imports. A message is eight bytes, its length, and JSON. A request says how many
`seconds` of processor time it may take: a timer of the kernel's ends the process after them, whatever it is doing. It
ends, too, when stdin ends, as it does when the other process is gone.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import signal
import sys
import time
from typing import IO, Any

try:
    import resource
except ImportError:  # not on Windows, where the clock of the other process is the only limit
    resource = None  # type: ignore[assignment]


def main() -> None:
    name, memory, *folders = sys.argv[1:]
    sys.path[:0] = [os.path.dirname(os.path.abspath(__file__)), *folders]
    # Whoever interrupts the other process by a terminal lets it finish first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _hear_the_clock()
    source, target = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    # What a library prints must not come between messages.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    module = importlib.import_module(name)
    _bound_memory(int(memory))
    write(target, {"ready": True})
    while (request := read(source)) is not None:
        _start_clock(float(request["seconds"]))
        try:
            reply = module.answer(request)
        except MemoryError:
            reply = {"limit": "it took too much memory"}
        except RecursionError:
            reply = {"limit": "it is nested too deeply"}
        except Exception as error:
            reply = {"failed": f"{type(error).__name__}: {error}"}
        write(target, reply)
        # Waiting takes no processor time, so that the clock may as well go on.


def read(source: IO[bytes]) -> dict[str, Any] | None:
    """Read a message, and add its `size` in bytes; None at the end."""
    size = source.read(8)
    if len(size) < 8:
        return None
    data = source.read(int.from_bytes(size, "big"))
    return {**json.loads(data), "size": len(data)}


def write(target: IO[bytes], message: dict[str, Any]) -> None:
    data = json.dumps(message).encode()
    target.write(len(data).to_bytes(8, "big") + data)
    target.flush()


def _bound_memory(size: int) -> None:
    if resource is None:
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for limit in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        hard = resource.getrlimit(limit)[1]
        size = size if hard == resource.RLIM_INFINITY else min(size, hard)
        try:
            resource.setrlimit(limit, (size, size))
        except (OSError, ValueError):  # macOS knows no RLIMIT_AS
            continue


def _hear_the_clock() -> None:
    """Undo what the other process may have set for the signals that end this one."""
    if resource is not None:
        ends = (signal.SIGPROF, signal.SIGXCPU)
        for number in ends:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ends)


def _start_clock(seconds: float) -> None:
    """Let the kernel end this process after so many seconds of processor time from now."""
    if resource is None:
        return
    # The timer is exact; the limit, in whole seconds of all that the process has had, holds should the timer not.
    signal.setitimer(signal.ITIMER_PROF, seconds)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = math.ceil(time.process_time() + seconds) + 1
    resource.setrlimit(
        resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard)
    )


if __name__ == "__main__":
    main()
