"""One process of a stage, watched: its notes are read as they come, and what hangs or dies is begun again behind it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .notes import BROKEN_DEVICE, VARIABLE, Task
from .stages import Stage

START_SECONDS = 60  # until the first item begins: torch may come from a slow disk
LOG_SHOWN = 1500  # characters of the end of a process's output, beside what went wrong
MOST_LOG = 50 << 20  # bytes of output that are kept
MOST_GARBAGE = 3  # lines that are no notes, of which each is told


class Part:
    """The processes of a part of a stage, one after the other.

    tell: takes each note.  It gets only what the driver can print: a dict with "item" and "ok".
    """

    def __init__(
        self,
        stage: Stage,
        task: Task,
        environment: Mapping[str, str],
        root: Path,
        tell: Callable[[dict[str, Any]], None],
    ) -> None:
        self.stage, self.task, self.root, self.tell = stage, task, root, tell
        self.environment = {**environment, VARIABLE: json.dumps(asdict(task))}
        self.log = Path(f"{task.rows}.log")
        self.current: str | None = None
        self.since = 0.0
        self.begun: set[str] = set()
        self.told = self.garbage = self.planned = self._offset = 0
        self._rest = b""
        for path in (task.rows, task.done, self.log):
            Path(path).write_bytes(b"")
        self._start()

    def _start(self) -> None:
        self.begun_before, self.current, self.since = len(self.begun), None, time.monotonic()
        with self.log.open("ab") as log:
            # A session of its own: it is ended with all that it began, and Ctrl+C is the driver's.
            self.process = subprocess.Popen(
                self.stage.command,
                cwd=self.root,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def poll(self) -> bool:
        """Read what is new; see to a process that has ended or hangs.  Returns whether one is still running."""
        running = self._see_to_it()
        if not running:
            self._count_the_rest()
        return running

    def _see_to_it(self) -> bool:
        self._read()
        status = self.process.poll()
        if status is not None:
            self._read()
            return self._ended(status)
        now = time.monotonic()
        if now > self.task.ends_at:
            self._stop("the time of the stage was up")
            return False
        limit = self.stage.each if self.current is not None else max(self.stage.each, START_SECONDS)
        if now - self.since > limit:
            hung = self.current or "a process"
            self._ask_where()
            self._kill()
            self._read()
            self._wrong(hung, f"hung: no end after {limit:.0f} s")
            return self._again()
        return True

    def stop(self, why: str) -> None:
        """End the process; what it was in, and what it has not begun, is left out for that reason."""
        self._stop(why)
        self._count_the_rest()

    def _count_the_rest(self) -> None:
        rest = self.planned - len(self.begun)
        if rest > 0:
            self.told += 1
            why = f"{rest} of {self.planned} were not begun"
            self.tell({"item": "the rest", "ok": None, "why": why, "count": rest})

    def _stop(self, why: str) -> None:
        self._kill()
        self._read()
        if self.current is not None or self.told == 0:
            self.tell({"item": self.current or "all of it", "ok": None, "why": f"{why} in the middle of it"})
            self.told += 1

    def _ended(self, status: int) -> bool:
        self._kill()  # what it began, and left behind
        how = f"ended with status {status}" if status >= 0 else f"was killed by {_name_of(-status)}"
        if self.current is not None:
            self._wrong(self.current, f"its process {how}")
            return self._again()
        if status not in (0, BROKEN_DEVICE):
            self._wrong(
                "a process", f"{how} {'between two items' if self.begun else 'before its first item'}"
            )
        elif self.told == 0:
            self._wrong("a process", "ended, and said nothing")
        return status != 0 and self._again()

    def _again(self) -> bool:
        """Begin again behind what was begun.  Returns whether there is time, and the last one got anywhere."""
        if len(self.begun) == self.begun_before or self.task.left < 5:
            return False
        self._start()
        return True

    def _read(self) -> None:
        with open(self.task.rows, "rb") as file:
            file.seek(self._offset)
            new = file.read()
        self._offset += len(new)
        if self.log.stat().st_size > MOST_LOG:
            os.truncate(self.log, 0)  # it is appended to, so what comes next begins it again
        *lines, self._rest = (self._rest + new).split(b"\n")
        if self.process.poll() is not None and self._rest:  # it died in the middle of a line
            lines, self._rest = [*lines, self._rest], b""
        for line in lines:
            self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            row = json.loads(line)
            if isinstance(row.get("plan"), int):
                self.planned = max(self.planned, row["plan"])
                return
            begins = row.get("begin")
            if not (
                isinstance(begins, str) or (isinstance(row["item"], str) and row["ok"] in (True, False, None))
            ):
                raise ValueError
        except (ValueError, KeyError, AttributeError, TypeError):
            self.garbage += 1
            if self.garbage <= MOST_GARBAGE:
                self._wrong("a process", f"wrote what is no note: {line[:100]!r}")
            return
        self.since = time.monotonic()
        if begins is not None:
            self.current = begins
            self.begun.add(begins)
            with open(self.task.done, "a", encoding="utf-8") as file:
                file.write(begins + "\n")
            return
        if row["item"] == self.current:
            self.current = None
        self.told += 1
        self.tell(row)

    def _wrong(self, item: str, why: str) -> None:
        self.told += 1
        end = self.log.read_bytes()[-LOG_SHOWN:].decode("utf-8", "replace")
        self.tell({"item": item, "ok": False, "why": why, "trace": end})

    def _ask_where(self) -> None:
        """Let a process write where it hangs; see `notes.open_notes`."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self.process.send_signal(signal.SIGUSR1)
            self.process.wait(0.3)

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _name_of(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
    return f"{name} (was memory short?)" if name == "SIGKILL" else name
