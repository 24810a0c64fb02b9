"""How a stage's process says what it does and finds: a line of JSON each, in a file that the driver reads meanwhile.

{"plan": 9}, where it is known how many items there are; {"begin": ITEM} as an item begins, then
{"item": ITEM, "ok": true, ...} with its figures. ok: false is wrong, with `why`; null is left out, with `why`. `say` is
a line for the summary, or several; `group` and `error` are summed up there.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VARIABLE = "PYMLLM_FIRST_CONTACT"  # the environment variable that holds a Task
BROKEN_DEVICE = 70  # the exit status of a process after which the device answers it no more
LONGEST_REASON = 400


class WrongResult(Exception):
    """A result that is not the right one.  found: figures to be noted all the same."""

    def __init__(self, why: str, found: dict[str, Any] | None = None) -> None:
        super().__init__(why)
        self.found = found or {}


class LeftOut(Exception):
    """A reason why something cannot be done here, which is nobody's fault."""


@dataclass(frozen=True)
class Task:
    """What the driver tells a process.

    rows: the file of its notes.  done: a file of the items that processes before it began, one a line.  part, parts:
    which of how many processes of its stage it is.  ends_at: when the stage's time is up, of time.monotonic().
    seconds: how long that was, at first.  out: the folder of results.  work: a folder for what is large, and removed.
    """

    stage: str
    rows: str
    done: str
    part: int
    parts: int
    ends_at: float
    seconds: float
    rehearse: bool
    out: str
    work: str

    @property
    def left(self) -> float:
        """The seconds that are left."""
        return self.ends_at - time.monotonic()


class Notes:
    """The notes of one process.

    healthy: returns why the device answers no more, or ""; it is asked after each item that went wrong.
    """

    def __init__(self, task: Task, healthy: Callable[[], str] = lambda: "") -> None:
        self.task, self.healthy = task, healthy
        self.begun = (
            set(Path(task.done).read_text("utf-8").splitlines()) if Path(task.done).exists() else set()
        )

    def plan(self, count: int) -> None:
        """Say how many items there are, so that those which there is no time for are counted."""
        self._write({"plan": count})

    def begin(self, item: str) -> None:
        self._write({"begin": item})

    def write(self, item: str, ok: bool | None, **found: Any) -> None:
        """Note an item's end.  found: JSON values."""
        self._write({"item": item, "ok": ok, **found})

    def run(self, item: str, work: Callable[[], dict[str, Any]], **more: Any) -> bool:
        """Do one item, and note what `work` returns or raises.  Returns whether it was done, and is right.

        What a process before this one began is not done again, and nothing is begun when the time is up.
        Ends the process where the device is broken.  more: what to note in any case.
        """
        if item in self.begun:
            return False
        if self.task.left < 1:
            return False
        self.begin(item)
        started = time.monotonic()
        try:
            self.write(item, True, **more, **work(), seconds=round(time.monotonic() - started, 2))
        except LeftOut as reason:
            self.write(item, None, **more, why=str(reason))
        except Exception as problem:
            self.wrong(item, problem, **more)
            return False
        return True

    def wrong(self, item: str, problem: BaseException, **more: Any) -> None:
        """Note what was raised; end the process where the device is broken."""
        lines = str(problem).strip().splitlines() or [""]
        why = lines[0] if isinstance(problem, WrongResult) else f"{type(problem).__name__}: {lines[0]}"
        trace = "".join(traceback.format_exception(problem))[-2000:]
        found = problem.found if isinstance(problem, WrongResult) else {}
        self.write(item, False, **{**more, **found}, why=why[:LONGEST_REASON], trace=trace)
        broken = self.healthy()
        if broken:
            self.write(f"{item}: the device", False, why=f"answers no more: {broken}"[:LONGEST_REASON])
            os._exit(BROKEN_DEVICE)

    def _write(self, row: dict[str, Any]) -> None:
        with open(self.task.rows, "a", encoding="utf-8") as file:  # one write a line, so that no two mix
            file.write(json.dumps(row) + "\n")


def open_notes() -> Notes:
    """Take up the task that the driver left in the environment."""
    notes = Notes(Task(**json.loads(os.environ[VARIABLE])))
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # the driver asks so where a process hangs, before it ends it
    threading.Thread(target=_die_with, args=(os.getppid(),), daemon=True).start()
    return notes


def _die_with(driver: int) -> None:
    """End this process, and all that it began, once the driver is gone."""
    while os.getppid() == driver:
        time.sleep(0.5)
    print("the driver is gone", file=sys.stderr)
    os.killpg(0, signal.SIGKILL)
