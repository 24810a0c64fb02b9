"""The signs of life of the thread that steps a model: whether steps really run while there is work."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from pymllm.engine.scheduler import STEP_TOKENS
from pymllm.parallel.away import Looks

# How long a step may take while none has been measured: a first one may compile kernels and record graphs.
FIRST_STEP_SECONDS = 300.0

# How long any step may take, and how many times what is known of steps.
LEAST_SECONDS = 30.0
TIMES = 3.0


class Pulse:
    """The time of the thread's last sign, and how long it may be silent while it has work.

    seconds: how long; None: as follows from the steps so far.  clock: tells the time, in seconds.
    """

    def __init__(self, seconds: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self._clock = seconds, clock
        self.steps = 0
        self._slowest = 0.0
        self._seconds_a_token: float | None = None  # of the step that ran tokens fastest
        self._silent_since: float | None = None
        self._watch: Looks | None = None
        self._away = (0.0, 0.0)  # since when the thread was silent as the process was away, and for how long

    def look(self) -> None:
        """Note that this process runs; who calls it, calls it several times a second.

        A time in which the process did not run is no silence of its thread.
        """
        self._watch = self._watch or Looks(self._clock)
        missed, since = self._watch.missed(), self._silent_since
        if missed and since is not None:
            self._away = (since, self._seconds_away(since) + missed)

    def _seconds_away(self, since: float | None) -> float:
        """Return how long the process was away in the silence that began then."""
        began, seconds = self._away
        return seconds if began == since else 0.0

    def expect(self) -> None:
        """Note that there is work."""
        if self._silent_since is None:
            self._silent_since = self._clock()

    def beat(self) -> float:
        """Note a sign of life.  Returns the time."""
        self._silent_since = now = self._clock()
        return now

    def rest(self) -> None:
        """Note that no work is left."""
        self._silent_since = None

    def note_step(self, started: float, tokens: int | None = None) -> float:
        """Take in a step that has ended.  Returns its seconds.

        started: what `beat` returned before it.  tokens: how many it ran; None: that is not known.
        """
        away = self._seconds_away(started)
        seconds = self.beat() - started
        self.steps += 1
        ran = max(seconds - away, 0.0)
        self._slowest = max(self._slowest, ran)
        if tokens:
            known = self._seconds_a_token
            self._seconds_a_token = ran / tokens if known is None else min(known, ran / tokens)
        return seconds

    @property
    def limit(self) -> float:
        """The number of seconds after which a silence means that a step hangs."""
        if self.seconds is not None:
            return self.seconds
        if not self.steps:
            return FIRST_STEP_SECONDS
        largest = STEP_TOKENS * (self._seconds_a_token or 0.0)
        return max(LEAST_SECONDS, TIMES * self._slowest, TIMES * largest)

    def why_not(self) -> str | None:
        """Return why the thread seems to hang, or None."""
        since = self._silent_since
        silent = 0.0 if since is None else self._clock() - since - self._seconds_away(since)
        if silent <= self.limit:
            return None
        return f"no step has ended for {silent:.0f} seconds; at most {self.limit:.0f} are usual here"


def device_fault(device: torch.device) -> str | None:
    """Return why a device will run nothing more, or None: some errors of a GPU stay until the process ends."""
    if device.type != "cuda":
        return None
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        return f"the GPU runs nothing more: {str(error).splitlines()[0]}"
    return None
