"""Signs of life of the ranks that torchrun has started, which tell a rank that is stopped from one that is busy."""

from __future__ import annotations

import os
import threading
import time
from datetime import timedelta

import torch

from pymllm.errors import RankError
from pymllm.parallel.away import Looks

BEAT_SECONDS = 1.0
SILENCE = 8.0  # seconds without a sign after which a rank counts as lost


class Heartbeat:
    """A thread that leaves a sign in torchrun's store every second, and looks for those of the other ranks."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        # A connection of its own: nothing waits in it for anybody.
        self._store = torch.distributed.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=SILENCE),
        )
        self._keys = [f"pymllm/alive/{rank}" for rank in range(size)]
        self._signs: list[bytes] = [b""] * size
        self._seen = [time.monotonic()] * size
        self._looked, self._watch = time.monotonic(), Looks()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise the RankError of a rank that gives no sign any more.  Costs nothing, and waits for nobody."""
        for rank, seen in enumerate(self._seen):
            # Where the store itself does not answer, nobody is known to be silent.
            silent = self._looked - seen
            if silent > SILENCE:
                raise RankError(
                    f"rank {rank} of {self.size} is lost",
                    code="rank-silent",
                    expected="a sign of life every second",
                    found=f"none for {silent:.0f} seconds: it is stopped, or its machine is gone",
                    fix="Start all ranks again.",
                )

    def stop(self) -> None:
        """End the thread."""
        self._over.set()
        self._thread.join(SILENCE)

    def _beat(self) -> None:
        count = 0
        try:
            while not self._over.wait(BEAT_SECONDS):
                count += 1
                self._store.set(self._keys[self.rank], str(count))
                now = time.monotonic()
                if self._watch.missed():
                    self._seen = [now] * self.size
                for rank, key in enumerate(self._keys):
                    sign = self._store.get(key) if self._store.check([key]) else b""
                    if sign != self._signs[rank]:
                        self._signs[rank], self._seen[rank] = sign, now
                self._looked = now
        except RuntimeError:
            return  # the store has ended with the job
