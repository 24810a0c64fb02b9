"""The stages, in their order, each with its share of the time and its number of processes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

CHILD = (sys.executable, "-m", "benchmarks.first_contact.child")


@dataclass(frozen=True)
class Stage:
    """Something to do, in one process or several.

    title: what the summary calls it.  share: seconds of 540 that it should get; it gets as much of what is left.
    each: the seconds after which one of its items hangs.  parts: the number of its processes on so many CPUs.
    command: what runs one of them.
    """

    name: str
    title: str
    share: float
    each: float
    parts: Callable[[int], int] = lambda cpus: 1
    command: tuple[str, ...] = CHILD


# What stands in one line runs side by side. Stages that measure run alone.
GROUPS: tuple[tuple[Stage, ...], ...] = (
    (Stage("env", "the machine, and a first kernel", 45, 60),),
    (
        Stage("checks", "kernels at real shapes beside float64", 165, 45, lambda cpus: max(1, 2 * cpus // 5)),
        Stage("tests", "the tests of the kernels, compiled", 165, 60, lambda cpus: max(1, cpus // 2)),
    ),
    (
        Stage(
            "end_to_end",
            "small models beside the CPU",
            80,
            60,
            lambda cpus: 1 if cpus < 8 else min(4, cpus // 4),
        ),
    ),
    (Stage("eight_b", "a model of 8 B shapes", 90, 150),),
    (Stage("launches", "what a launch costs the host", 15, 60),),
    (Stage("tune", "the tiles of a few shapes", 35, 60),),
    (Stage("tables", "the tables of benchmarks/gpu_*.py", 110, 130),),
)


def chosen(names: Sequence[str], groups: Sequence[Sequence[Stage]] = GROUPS) -> list[tuple[Stage, ...]]:
    """Keep the named stages, or all where none is named.  ValueError for a name that no stage has."""
    known = [stage.name for group in groups for stage in group]
    for name in names:
        if name not in known:
            raise ValueError(f"there is no stage {name!r}: choose among {', '.join(known)}")
    kept = [tuple(stage for stage in group if not names or stage.name in names) for group in groups]
    return [group for group in kept if group]
