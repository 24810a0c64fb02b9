"""The line before a model: a bounded number of places, taken at once or waited for in turn."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from dataclasses import dataclass


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
    """So many places in all, given to whoever came first; any thread may give them back."""

    def __init__(self, capacity: int) -> None:
        self.capacity = self.free = capacity
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
            self._hand_out()

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
