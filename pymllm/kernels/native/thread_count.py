"""How many threads run kernels: torch's count, which a container's CPU quota lowers unless somebody chose it.

Kernels are given `torch.get_num_threads()` at every call, so `torch.set_num_threads` holds from the next one on. What
torch takes by itself is one thread for each physical core that the process may run on; a quota it does not know, and
threads that wait for one another while the quota is used up stand still, all of them, until the next period.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from typing import Any

import torch

from pymllm.control_groups import cpu_quota, whole_cpus
from pymllm.kernels.native.extension import probe

logger = logging.getLogger("pymllm")

# Variables that choose torch's count before it starts.
CHOOSERS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_CHOICE = re.compile(
    r"\s*\+?0*[1-9][0-9]*\s*(,.*)?"
)  # "4", or "4,2" for teams inside teams; torch passes over others


def lower_to_quota() -> int | None:
    """Lower torch's number of threads to the CPU quota, where it is torch's own choice and above that.

    Returns the new number, and logs a warning with it; None: nothing was changed.
    """
    quota, threads = cpu_quota(), torch.get_num_threads()
    if quota is None or threads <= whole_cpus(quota) or _chosen(threads):
        return None
    torch.set_num_threads(whole_cpus(quota))
    logger.warning(
        "this container may use %.4g CPUs: torch's threads are now %d instead of %d. OMP_NUM_THREADS, or "
        "torch.set_num_threads after the model is loaded, gives another number.",
        quota,
        whole_cpus(quota),
        threads,
    )
    return whole_cpus(quota)


@functools.cache
def lower_to_quota_once() -> None:
    """Call `lower_to_quota` the first time that this process loads a model, and never again."""
    lower_to_quota()


def describe_threads() -> dict[str, Any]:
    """Tell how many threads a model loaded now would run on, the quota in CPUs, and what chose the number."""
    quota, threads = cpu_quota(), torch.get_num_threads()
    limited = quota is not None and whole_cpus(quota) < threads and not _chosen(threads)
    return {
        "count": whole_cpus(quota) if limited and quota is not None else threads,
        "cpu_quota": quota,
        "chosen_by": _chooser() or ("cpu quota" if limited else "torch"),
    }


def _chooser() -> str | None:
    """Name the variable that chooses torch's count, if any does."""
    return next((name for name in CHOOSERS if _CHOICE.fullmatch(os.environ.get(name, ""))), None)


def _chosen(threads: int) -> bool:
    """Tell whether the user chose torch's count: by a variable, or by a number that torch would not take itself."""
    try:
        cpu = probe()
    except ValueError:  # PYMLLM_CPU_ISA is wrong, which others report
        return False
    return _chooser() is not None or threads not in (
        cpu.physical_cores,
        cpu.logical_cpus,
        os.cpu_count(),
    )
