"""The child that judges inputs: a fork with limits, whose death is a verdict like any other."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from pymllm.errors import PymllmError

from .inputs import Input, Kind

# What an input may take beyond what the child has when it begins.
MEMORY = 3 << 29
# Seconds of a processor's time, and of the clock, which a busy machine stretches.
CPU_SECONDS, SECONDS = 20, 120

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Verdict:
    """What became of an input.

    name: "same", "refused" (one of our errors), "different", "foreign" (exception), "memory", "crash" or "hang".
    detail: the error's code, or the exception and where it was raised.
    """

    name: str
    detail: str = ""

    def bad(self, given: Input) -> bool:
        """Tell whether no input like this one may end so."""
        return self.name not in ("same", "refused", *(("different",) if given.meaning == "means" else ()))

    def __str__(self) -> str:
        return f"{self.name}: {self.detail}" if self.detail else self.name


def judged(kind: Kind, given: Input) -> Verdict:
    """Judge an input in this process, and name what comes of it."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        try:
            return Verdict("same" if kind.judge(given, Path(folder)) else "different")
        except PymllmError as error:
            return _refused(error)
        except (KeyboardInterrupt, SystemExit):
            raise
        # Some foreign libraries raise what is no Exception.
        except BaseException as error:
            name = "memory" if isinstance(error, MemoryError) else "foreign"
            return Verdict(name, f"{type(error).__name__} at {_place(error)}: {str(error)[:200]}")


def _refused(error: PymllmError) -> Verdict:
    """Look at one of our errors: it shows no control character, and is not longer than a screen."""
    text = str(error)
    if any(not letter.isprintable() for letter in text if letter not in "\n"):
        return Verdict("foreign", f"an error that shows what does not print: {error.code}")
    if len(text) > 100_000:
        return Verdict("foreign", f"an error of {len(text)} characters: {error.code}")
    # What no check has foreseen: an error of ours, and yet another's exception.
    if error.code == "unforeseen":
        said, _, place = str(error.found).rpartition(", at ")
        return Verdict("foreign", f"unforeseen at {place}: {said[:200]}")
    return Verdict("refused", error.code)


def _place(error: BaseException) -> str:
    """Return where an exception left our code: the last line of pymllm that it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if f"{os.sep}pymllm{os.sep}" in frame.filename] or frames
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "nowhere"


class Child:
    """A fork that judges one kind's inputs, one after another, and is replaced when one ends it."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.pid = 0
        self.pipe: Connection | None = None

    def judge(self, given: Input) -> Verdict:
        """Send an input and wait for its verdict."""
        if self.pipe is None:
            self._start()
        assert self.pipe is not None
        before, end = _cpu_seconds(self.pid), time.monotonic() + SECONDS
        try:
            self.pipe.send(given)
            while not self.pipe.poll(0.1):
                used = _cpu_seconds(self.pid) - before
                if used > CPU_SECONDS or time.monotonic() > end:
                    self.stop()
                    return Verdict("hang", f"{used:.0f} s of a processor, and no end")
            verdict = self.pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return Verdict("crash", self._wait())
        assert isinstance(verdict, Verdict)
        return verdict

    def stop(self) -> None:
        """End the child."""
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self._wait()

    def _start(self) -> None:
        ours, its = multiprocessing.Pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            ours.close()
            self._serve(its)
        its.close()
        self.pipe = ours

    def _serve(self, pipe: Connection) -> None:
        """Judge what comes, in the child; never returns."""
        try:
            # A crash is a verdict: nobody reads where it came from.
            faulthandler.disable()
            with contextlib.suppress(ValueError):
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                limit = _address_space() + MEMORY
                # A sanitizer maps terabytes of shadow.
                if limit < 1 << 40:
                    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            while True:
                pipe.send(judged(self.kind, pipe.recv()))
        except (EOFError, KeyboardInterrupt):
            pass
        finally:
            os._exit(0)

    def _wait(self) -> str:
        """Reap the child and say how it ended."""
        _, status = os.waitpid(self.pid, 0)
        if self.pipe is not None:
            self.pipe.close()
        self.pid, self.pipe = 0, None
        if os.WIFSIGNALED(status):
            return signal.Signals(os.WTERMSIG(status)).name
        return f"exit {os.WEXITSTATUS(status)}"


def _cpu_seconds(pid: int) -> float:
    """Return the processor's time that a process has used."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _address_space() -> int:
    """Return how many bytes of addresses this process has."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return 1 << 40
    return pages * resource.getpagesize()


def save(folder: Path, kind: Kind, given: Input, verdict: Verdict) -> Path:
    """Keep an input as a folder that `load` reads: its files, and case.json."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    given.write(folder / "files")
    case = {"kind": kind.name, "subject": given.subject, "changed": given.changed, "meaning": given.meaning}
    (folder / "case.json").write_text(json.dumps({**case, "verdict": str(verdict)}, indent=1) + "\n")
    return folder
