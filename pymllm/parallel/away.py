"""The absence of whoever watches others: a machine that slept, a paused container, a process that was stopped.

Clocks may go on meanwhile. What others did not say then says nothing of them: they may have been away as well, and what
they have sent may not have been read yet. So nobody's silence is judged before they have had their time once more.
"""

from __future__ import annotations

import time
from collections.abc import Callable

# Seconds between two looks of a watcher, which looks several times a second, from which on it has been away.
LONGEST_LOOK = 4.0


class Looks:
    """The looks of one watcher, by a clock that never goes back.

    clock: tells the time, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._looked = clock()

    def missed(self) -> float:
        """Note a look.  Returns how many seconds this watcher has been away since its last look; 0.0: it was not."""
        now = self._clock()
        gap, self._looked = now - self._looked, now
        return gap if gap > LONGEST_LOOK else 0.0
