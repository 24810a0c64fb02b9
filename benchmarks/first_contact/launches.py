"""The stage `launches`: what a launch costs the host: `benchmarks/gpu_launch_cost.py`, where this clone has it."""

from __future__ import annotations

from .driver import ROOT
from .notes import LeftOut, Notes
from .scripts import run_script

SCRIPT = "gpu_launch_cost"


def run(notes: Notes) -> None:
    def measure() -> dict[str, object]:
        if not (ROOT / "benchmarks" / f"{SCRIPT}.py").exists():
            raise LeftOut(f"there is no benchmarks/{SCRIPT}.py")
        said = run_script(SCRIPT, [], notes.task)
        return {"say": [line for line in said.splitlines() if line.strip()][-14:]}

    notes.run(SCRIPT, measure)
