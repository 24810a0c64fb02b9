"""The time of GPU kernels, captured in a CUDA graph over several sets of weights.

No cache helps, as the sets do not fit one, and the host's time does not count.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

from pymllm.kernels.capturing import captured

WARM_UPS, REPLAYS = 2, 7


def seconds_each(calls: Sequence[Callable[[], object]]) -> float:
    """Measure the median time of one of `calls`, in seconds on the GPU.

    calls: the same work, each over tensors of its own.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph, _ = captured(lambda: [call() for call in calls], stream)
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times)


def sets_beyond_caches(nbytes: int) -> int:
    """Return how many sets of `nbytes` make up four times the second-level cache, and at least 8."""
    cache = getattr(torch.cuda.get_device_properties(), "L2_cache_size", 0) or 64 << 20
    return max(8, -(-4 * cache // max(nbytes, 1)))
