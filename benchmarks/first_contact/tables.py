"""The stage `tables`: the tables of benchmarks/gpu_*.py, each with a budget, in the order of what they tell.

They are kept as tables.md and tables.json in the folder of results, and in benchmarks/results.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .driver import ROOT
from .notes import Notes, WrongResult
from .scripts import run_script

RESULTS = ROOT / "benchmarks/results"
# By script, its share of the time.
SCRIPTS = {"gpu_linear": 40, "gpu_attention": 25, "gpu_moe": 22, "gpu_elementwise": 13, "gpu_decode": 10}
REHEARSED = ("gpu_attention", "gpu_elementwise")
START_S = 8  # of a script, before its budget begins: Python and torch
LEAST_S, MOST_S = 3, 80  # of a budget
SHOWN = 6  # rows of each in the summary


def budget_of(name: str, left: float, grace: float) -> float:
    """Return the seconds that a script may measure, so that those behind it get their share of what is left.

    grace: what the last row of a script may take beyond its budget, before it ends itself.
    """
    later = list(SCRIPTS)[list(SCRIPTS).index(name) :]
    share = SCRIPTS[name] / sum(SCRIPTS[script] for script in later)
    return min(MOST_S, (left - grace - START_S * len(later)) * share)


def run(notes: Notes) -> None:
    from gpu_roofline import GRACE_S

    for name in REHEARSED if notes.task.rehearse else SCRIPTS:
        budget = budget_of(name, notes.task.left, GRACE_S)
        if budget < LEAST_S:
            notes.write(name, None, why="the time was up")
            continue
        notes.run(name, lambda name=name, budget=budget: measure(name, budget, notes))  # type: ignore[misc]


def measure(name: str, budget: float, notes: Notes) -> dict[str, Any]:
    """Run a script, and keep its table.  Raises WrongResult where one of our kernels failed in it."""
    before, report = _stamp(name), None
    try:
        run_script(name, ["--budget", f"{budget:.0f}"], notes.task)
    finally:
        if _stamp(name) != before:
            report = _keep(name, Path(notes.task.out))
    if report is None:
        if notes.task.rehearse:
            return {"say": f"{name}: every row ran in the interpreter"}
        raise WrongResult("wrote no table")
    return {"rows": len(report["rows"]), "say": [f"{name}: {_title(report)}", *_best(report)]}


def _stamp(name: str) -> int | None:
    path = RESULTS / f"{name}.json"
    return path.stat().st_mtime_ns if path.exists() else None


def _keep(name: str, out: Path) -> dict[str, Any]:
    """Add a table to tables.md and tables.json."""
    report: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    path = out / "tables.json"
    tables = json.loads(path.read_text("utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**tables, name: report}), encoding="utf-8")
    with (out / "tables.md").open("a", encoding="utf-8") as file:
        file.write((RESULTS / f"{name}.md").read_text("utf-8") + "\n")
    return report


def _title(report: dict[str, Any]) -> str:
    failed = sum("failed" in row for row in report["rows"])
    said = f"{len(report['rows'])} rows, {failed} failed, {len(report.get('left_out', ()))} left out"
    if "read_bandwidth" in report:
        said += f"; reading reaches {report['read_bandwidth'] / 1e12:.2f} TB/s"
    return said


def _best(report: dict[str, Any]) -> list[str]:
    """Describe rows of ours that ran, spread over the table."""
    if "logit_error" in report:
        return [
            f"  {row['batch']} requests: {row['tokens_per_second']} tokens/s"
            for row in report["rows"]
            if row["graphs"]
        ]
    ours = [row for row in report["rows"] if row["kernel"].startswith("triton") and "microseconds" in row]
    return [
        f"  {row['work']}, {row['kernel']}: {row['microseconds']} us, {row['share_of_bandwidth']} of it, "
        f"{row['tflops']} TFLOP/s"
        for row in ours[:: max(1, len(ours) // SHOWN)][:SHOWN]
    ]
