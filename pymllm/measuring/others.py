"""The share of the CPUs that other processes take while something is measured."""

from __future__ import annotations

import os
import time
from pathlib import Path

STATISTICS = Path("/proc/stat")
# Of /proc/stat's first line: user, nice, system, irq, softirq and steal; idle and iowait are no work, and guests are
# counted among users (proc_stat(5)).
BUSY = (0, 1, 2, 5, 6, 7)

# Of fewer CPUs than this the kernel's ticks say nothing.
NOTEWORTHY = 0.1


def busy_seconds(text: str, ticks: int) -> float:
    """Read the seconds of work of all CPUs from the text of /proc/stat.  ticks: a second."""
    numbers = [int(number) for number in text.split("\n", 1)[0].split()[1:]]
    return sum(numbers[place] for place in BUSY if place < len(numbers)) / ticks


def own_seconds() -> float:
    """Return the seconds of work of this process and of those that it has waited for."""
    return sum(os.times()[:4])


class OtherProcesses:
    """A watch over what others do from its making on."""

    def __init__(self) -> None:
        self._before = self._now()

    def cpus(self) -> float | None:
        """Return how many CPUs others have taken since then, on average; None where the system does not say."""
        now = self._now()
        if self._before is None or now is None:
            return None
        elapsed, all_work, own = (after - before for after, before in zip(now, self._before, strict=True))
        return max(0.0, (all_work - own) / elapsed) if elapsed > 0 else None

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        try:
            text = STATISTICS.read_text()
        except OSError:
            return None
        return time.perf_counter(), busy_seconds(text, os.sysconf("SC_CLK_TCK")), own_seconds()
