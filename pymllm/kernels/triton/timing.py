"""How long GPU kernels take: captured in a CUDA graph over several sets of weights; no cache helps, no host waits."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

WARM_UPS, REPLAYS = 2, 7


def seconds_each(calls: Sequence[Callable[[], object]]) -> float:
    """The median time of one of `calls`, which are the same work over tensors of their own each, on the GPU."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
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
    """How many sets of tensors of this size are more than four times the second-level cache, at least 8."""
    cache = getattr(torch.cuda.get_device_properties(), "L2_cache_size", 0) or 64 << 20
    return max(8, -(-4 * cache // max(nbytes, 1)))
