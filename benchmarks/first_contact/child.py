"""The process of a stage: it looks whether the stage can run at all, and runs its module."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType

from .driver import ROOT
from .notes import Notes, open_notes

MODULES = {
    "env": "environment",
    "checks": "checks",
    "tests": "kernel_tests",
    "end_to_end": "end_to_end",
    "eight_b": "eight_b",
    "launches": "launches",
    "tune": "tune",
    "tables": "tables",
}
REHEARSE = "Without a GPU, rehearse: python3 -m benchmarks.first_contact --rehearse"


def why_not_here(rehearse: bool) -> str | None:
    """Return why nothing can run on this machine, or None."""
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported ({error}): give a Python that has it, make gpu PYTHON=..."
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error}): give a Python that has it, make gpu PYTHON=..."
    if not rehearse and not torch.cuda.is_available():
        return f"no GPU: torch {torch.__version__} sees none. {REHEARSE}"
    if rehearse and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        return f"Triton {triton.__version__} does not interpret with today's numpy: a rehearsal needs 3.7 or later"
    return None


def device_answer() -> str:
    """Return why the device answers no more, or ""."""
    import torch

    try:
        torch.cuda.synchronize()
    except Exception as error:  # whatever it is, the device is of no more use to this process
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return ""


def main(notes: Notes | None = None) -> int:
    notes = notes or open_notes()
    task = notes.task
    why = why_not_here(task.rehearse)
    if why is not None:
        notes.write("this machine", False, why=why, fatal=why)
        return 0
    if not task.rehearse:
        notes.healthy = device_answer
    module: ModuleType | None = None
    try:
        sys.path.append(str(ROOT / "benchmarks"))  # the scripts of the tables import one another as they lie
        module = importlib.import_module(f"benchmarks.first_contact.{MODULES[task.stage]}")
    except Exception as problem:
        notes.wrong("importing the stage", problem)
        return 0
    work: Callable[[Notes], None] = module.run
    try:
        work(notes)
    except Exception as problem:
        notes.wrong("the stage itself", problem)
    return 0


if __name__ == "__main__":
    sys.exit(main())
