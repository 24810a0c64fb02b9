"""Capturing a CUDA graph so that no failure leaves a capture open."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def captured(run: Callable[[], T], stream: torch.cuda.Stream) -> tuple[torch.cuda.CUDAGraph, T]:
    """Capture what `run` launches.  Returns the graph, and what `run` returned, which a replay fills anew.

    stream: of this GPU; torch's own is of the first GPU that captured.
    What `run` raises is raised after the capture has ended, and with the stream current that was so before.
    """
    current, pool = torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
    graph, failure = torch.cuda.CUDAGraph(), None
    try:
        # Other threads may take memory meanwhile, or ask for events: for another model, or as NCCL's watch does.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            try:
                result = run()
            except BaseException as error:
                failure = error
                raise
    except BaseException as error:
        # Ending a capture that CUDA has given up raises an error of its own, which says less, and torch then leaves
        # the capture's stream the current one, and its pool open to allocations.
        torch.cuda.set_stream(current)
        with contextlib.suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(current.device_index, pool)
        raise failure or error from None
    finally:
        failure = None  # it has this frame, and so the step's tensors
    return graph, result
