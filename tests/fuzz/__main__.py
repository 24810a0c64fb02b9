"""`python -m tests.fuzz`: change good files, requests and native calls, and see that each ends as it may.

Each input ends in one of two ways: the same answer as without the change, or one PymllmError. The rest is a finding:
another project's exception, a crash, a hang, memory without bound, or another answer where the change means nothing. A
finding is written to a folder; `tests/attacks` holds those that were mended. Exits with 1 where there is one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from .campaign import Tally, run_by_name
from .kinds import KINDS

NAMES = ("same", "refused", "different", "foreign", "memory", "crash", "hang")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "kinds", nargs="*", choices=[[], *KINDS], help=f"of {', '.join(KINDS)}; all without this"
    )
    parser.add_argument("--seconds", type=float, default=60, help="for all kinds together (60)")
    parser.add_argument("--inputs", type=int, help="so many of each kind, instead of a time")
    parser.add_argument(
        "--seed", type=int, default=1, help="the same inputs again, as many as the time allows (1)"
    )
    parser.add_argument("--workers", type=int, default=2, help="kinds side by side (2)")
    parser.add_argument(
        "--keep", type=Path, default=Path("build/fuzz"), help="where findings are written (build/fuzz)"
    )
    asked = parser.parse_args()
    torch.set_num_threads(1)
    names = asked.kinds or list(KINDS)
    share = None if asked.inputs else asked.seconds * min(asked.workers, len(names)) / len(names)
    asked.keep.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    # Each kind in a fresh interpreter: what one imports or leaves behind is not the other's.
    context = multiprocessing.get_context("spawn")
    jobs = [(name, asked.seed, asked.keep, share, asked.inputs) for name in names]
    with context.Pool(min(asked.workers, len(names)), maxtasksperchild=1) as pool:
        tallies = pool.starmap(run_by_name, jobs, chunksize=1)
    print(table(tallies))
    print(f"seed {asked.seed}, {time.monotonic() - started:.0f} s")
    return int(any(tally.found for tally in tallies))


def table(tallies: list[Tally]) -> str:
    """Write what became of the inputs, a line a kind."""
    lines = [
        "| kind | inputs | " + " | ".join(NAMES) + " | findings |",
        "| --- |" + " ---: |" * (len(NAMES) + 2),
    ]
    total: Counter[str] = Counter()
    for tally in [*tallies]:
        counts = Counter(
            {name: sum(n for (_, each), n in tally.classes.items() if each == name) for name in NAMES}
        )
        total += Counter(dict(counts, inputs=tally.inputs, found=len(tally.found)))
        cells = [tally.inputs, *(counts[name] for name in NAMES), len(tally.found)]
        lines.append(f"| {tally.kind} | " + " | ".join(map(str, cells)) + " |")
    cells = [total["inputs"], *(total[name] for name in NAMES), total["found"]]
    lines.append("| all | " + " | ".join(map(str, cells)) + " |")
    allowed = sum(
        n
        for tally in tallies
        for (meaning, name), n in tally.classes.items()
        if (meaning, name) == ("means", "different")
    )
    lines.append(f"Of those that differ, {allowed} are right files that say something else.")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
