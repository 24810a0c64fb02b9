"""Compiling a GPU's kernels before the first request, which would wait for them otherwise."""

from __future__ import annotations

import logging
from collections.abc import Callable

from pymllm.engine.warm_up import launches_of_steps
from pymllm.kernels.attention import PAGE_SIZE
from pymllm.kernels.hardware import current, probe_device
from pymllm.kernels.triton.compile_launches import compile_launches, distinct
from pymllm.kernels.triton.launch import interpreting
from pymllm.kernels.triton.requirements import triton_installed
from pymllm.loading.prepare import Prepared
from pymllm.loading.progress import progress_bar
from pymllm.planning.plan import Plan

logger = logging.getLogger("pymllm")


def why_not_warmed(prepared: Prepared) -> str | None:
    """Return why there is nothing to compile before the first request, or None."""
    if probe_device(prepared.execution.device).type != "cuda":
        return "there is no GPU"
    if interpreting() or not triton_installed():
        return "Triton compiles nothing here"
    if prepared.parallel.size > 1:
        return "the model is divided over ranks"
    return None


def compile_kernels(prepare_again: Callable[[], Prepared], plan: Plan, progress: bool | None = None) -> int:
    """Compile the kernels of all steps, or take them from Triton's cache on disk.

    prepare_again: prepares the checkpoint once more: that model, which gets no data, goes through the steps.
    progress: as for `load_prepared`.
    Returns the number of kernels; 0 where the steps of a model cannot be gone through so: its kernels are compiled as
    they are first launched, and a warning says why.
    """
    try:
        again = prepare_again()
        for unit in again.units:
            unit.holder.finish()
        kv_cache = plan.kv_cache
        pages, requests = kv_cache["tokens"] // PAGE_SIZE, kv_cache["requests"]
        launches = distinct(launches_of_steps(again.model, kv_cache["max_model_len"], pages, requests))
    except Exception as error:  # of a model's own code, which may ask for data
        logger.warning("kernels are compiled when first launched: %s: %s", type(error).__name__, error)
        return 0
    logger.info("compiling %d kernels", len(launches))
    bar = progress_bar("Compiling kernels", len(launches), progress, unit=" kernels")
    # Triton compiles for the thread's current GPU.
    with bar as advance, current(probe_device(again.execution.device).torch_device):
        failed = compile_launches(launches, advance=advance)
    if failed:
        text = "%d of %d kernels were not compiled; the first request that needs one says why"
        logger.warning(text, failed, len(launches))
    return len(launches)
