"""A machine whose ranks follow the rank 0 of another one: they are started, and started again when that one is."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pymllm.errors import RankError
from pymllm.parallel.away import Looks
from pymllm.parallel.children import Child, is_stopped

# The exit code of a follower whose rank 0 has gone.
LOST = 3
TICK = 0.2
PAUSE = 1.0  # seconds before lost ranks are started again
MOST_STOPPED = 10.0  # seconds that a rank may be stopped: rank 0 has given it up then, and it cannot notice


def follow_on_node(
    ranks: Sequence[int], size: int, host: str, port: int, key: str, settings: Mapping[str, Any]
) -> int:
    """Keep these ranks until rank 0 ends them.  Returns the exit code.

    settings: {"model": ..., "options": {...}}, what they load.  RankError for a rank that cannot.
    """
    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: stopping.append(number))
    while True:
        children = {
            rank: _start(rank, place, size, host, port, key, settings) for place, rank in enumerate(ranks)
        }
        running, watch = {child: time.monotonic() for child in children.values()}, Looks()
        try:
            while not stopping and not any(child.ended for child in running):
                time.sleep(TICK)
                if watch.missed():
                    running = dict.fromkeys(running, time.monotonic())
                for child in running:
                    if not is_stopped(child.process):
                        running[child] = time.monotonic()
                    elif time.monotonic() - running[child] > MOST_STOPPED:
                        child.kill()
            if stopping:
                return 128 + stopping[0]
            # Those that rank 0 ends, end together.
            ends = {rank: child.process.wait() for rank, child in children.items() if child.wait(PAUSE)}
            if len(ends) == len(children) and not any(ends.values()):
                return 0
            for rank, code in ends.items():
                if code > 0 and code != LOST:
                    raise RankError(
                        f"rank {rank} of {size} has failed: {children[rank].describe_end()}",
                        code="rank-failed",
                    )
        finally:
            for child in children.values():
                child.kill()
        print("The ranks of this machine are started anew.", file=sys.stderr, flush=True)
        time.sleep(PAUSE)


def _start(
    rank: int, place: int, size: int, host: str, port: int, key: str, settings: Mapping[str, Any]
) -> Child:
    where = ["--rank", str(rank), "--size", str(size), "--local-rank", str(place)]
    told = {
        "PYMLLM_RANK_KEY": key,
        "PYMLLM_RANK_PARENT": str(os.getpid()),
        "PYMLLM_RANK_SETTINGS": json.dumps(settings),
    }
    return Child(["-m", "pymllm.follower", *where, "--host", host, "--port", str(port)], told)
