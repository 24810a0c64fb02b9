"""The stage `launches`: what a launch costs the host, by `benchmarks/gpu_launch_cost.py`."""

from __future__ import annotations

from typing import Any

from .notes import LeftOut, Notes
from .scripts import run_script

SCRIPT, BATCHES = "gpu_launch_cost", 60


def run(notes: Notes) -> None:
    def measure() -> dict[str, Any]:
        if notes.task.rehearse:
            raise LeftOut("the interpreter launches nothing")
        said = run_script(SCRIPT, ["--batches", str(BATCHES)], notes.task)
        return {"say": [line for line in said.splitlines() if line.startswith("|")]}

    notes.run(SCRIPT, measure)
