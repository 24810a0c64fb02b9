"""Compiling kernels for the GPU that is here before they are launched, several at a time, or from Triton's cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from pymllm.kernels.triton.ahead_of_time import binary_key
from pymllm.kernels.triton.launch import Launch


def distinct(launches: Iterable[Launch]) -> list[Launch]:
    """Return one launch for each binary."""
    return list({binary_key(launch): launch for launch in launches}.values())


def compile_launches(
    launches: Iterable[Launch],
    *,
    workers: int | None = None,
    advance: Callable[[int], object] = lambda count: None,
) -> int:
    """Compile what these launches need, and launch nothing.  What is in Triton's cache on disk is read from there.

    workers: threads; None: one for each CPU.  advance: is told, from any thread, that one more is done.
    Returns how many were not to be compiled: the first real launch of each says why.
    """
    import triton

    def done(future: Future[Any]) -> None:
        advance(1)

    futures: list[Future[Any]] = []
    with (
        ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True) as mode,
    ):
        for launch in distinct(launches):
            constants = {name: getattr(value, "compiled", value) for name, value in launch.constants.items()}
            launch.kernel.compiled.warmup(*launch.arguments, grid=launch.grid, **constants)
            added = mode.raw_futures[len(futures) :]
            for future in added:
                future.add_done_callback(done)
            futures += added
    return sum(future.exception() is not None for future in futures)
