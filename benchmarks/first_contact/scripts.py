"""A script of benchmarks/, run in a process of the stage's group: it is ended with the stage."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from .driver import ROOT
from .notes import Task, WrongResult


def run_script(name: str, arguments: Sequence[str], task: Task) -> str:
    """Run a script, with --dry-run in a rehearsal.  Returns what it printed.

    WrongResult where it fails, or does not end in the stage's time.
    """
    command = [sys.executable, f"benchmarks/{name}.py", *arguments, *(["--dry-run"] if task.rehearse else [])]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    try:
        done = subprocess.run(command, cwd=ROOT, timeout=max(1.0, task.left), check=False, **pipes)  # type: ignore[call-overload]
    except subprocess.TimeoutExpired as error:
        print(error.stdout)
        raise WrongResult(f"did not end within {error.timeout:.0f} s") from None
    print(done.stdout)
    if done.returncode:
        last = next((line for line in reversed(done.stdout.splitlines()) if line.strip()), "")
        raise WrongResult(f"ended with status {done.returncode}: {last}")
    said: str = done.stdout
    return said
