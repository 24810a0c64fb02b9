"""The line before a model: a bounded number of places, taken at once or waited for in turn."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

# How many places that were given back tell of the line's speed, and for how long.
REMEMBERED, REMEMBERED_SECONDS = 64, 120.0


class Busy(Exception):
    """The refusal of a request because the line is full."""


@dataclass(eq=False)
class _Waiting:
    """Somebody who waits for places: in which loop, and whether they have been given."""

    count: int
    loop: asyncio.AbstractEventLoop
    told: asyncio.Future[None]
    granted: bool = False


class Places:
    """So many places in all, given to whoever came first; any thread may give them back.

    clock: tells the time, in seconds.
    """

    def __init__(self, capacity: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.capacity = self.free = capacity
        self._clock = clock
        self._given_back: deque[float] = deque(maxlen=REMEMBERED)
        self._waiting: deque[_Waiting] = deque()
        self._lock = threading.Lock()

    def check(self, count: int = 1) -> None:
        """Refuse with Busy if so many places are not free."""
        if count > self.free or self._waiting:
            raise Busy

    def take(self, count: int = 1) -> None:
        """Take places at once.  Busy if there are too few."""
        with self._lock:
            self.check(count)
            self.free -= count

    async def wait(self, count: int = 1) -> None:
        """Take places, once those that came before have theirs and so many are free."""
        loop = asyncio.get_running_loop()
        with self._lock:
            if not self._waiting and count <= self.free:
                self.free -= count
                return
            one = _Waiting(count, loop, loop.create_future())
            self._waiting.append(one)
        try:
            await one.told
        except BaseException:
            with self._lock:
                if one.granted:
                    self.free += count
                else:
                    with contextlib.suppress(ValueError):
                        self._waiting.remove(one)
                self._hand_out()
            raise

    def give_back(self, count: int = 1) -> None:
        with self._lock:
            self.free += count
            self._given_back.extend([self._clock()] * min(count, REMEMBERED))
            self._hand_out()

    def seconds_of_line(self) -> float | None:
        """Return how long the places that are taken now will take at the speed of late; None: that is not known."""
        with self._lock:
            now, taken = self._clock(), self.capacity - self.free
            late = [when for when in self._given_back if now - when <= REMEMBERED_SECONDS]
        # From the first on, others followed.
        if len(late) < 2 or now <= late[0]:
            return None
        return taken * (now - late[0]) / (len(late) - 1)

    def refuse_waiting(self, error: Exception) -> None:
        """Have everybody who waits raise this error."""
        with self._lock:
            while self._waiting:
                one = self._waiting.popleft()
                self._tell(one, error)

    def _hand_out(self) -> None:
        while self._waiting and self._waiting[0].count <= self.free:
            one = self._waiting.popleft()
            self.free -= one.count
            one.granted = True
            if not self._tell(one):
                self.free += one.count

    @staticmethod
    def _tell(one: _Waiting, error: Exception | None = None) -> bool:
        """Tell somebody who waits that it is over.  Returns whether the loop is still there."""

        def tell() -> None:
            if not one.told.done():
                one.told.set_result(None) if error is None else one.told.set_exception(error)

        try:
            one.loop.call_soon_threadsafe(tell)
        except RuntimeError:
            return False
        return True
