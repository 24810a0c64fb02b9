"""The machine's memory: how much of it a model may take, and the return of what was freed while loading."""

from __future__ import annotations

import ctypes
import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from pymllm.control_groups import group_folders
from pymllm.errors import ConfigError, PymllmError, counted
from pymllm.gpus import named_gpu

# The files of a control group, version 2, then version 1: limit, usage, statistics, and the statistic that counts the
# part of the usage that is only cache.
CGROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat", "total_inactive_file"),
)

# Bytes of the largest block that glibc may keep once it is freed: 32 MB, less its own head and what aligns it.
LARGEST_KEPT = (32 << 20) - (64 << 10)

# What torch's allocators say when there is no memory.
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


def available_memory(device: str) -> int | None:
    """Return how many bytes this process could still take on `device`: "cpu", or a GPU by its number, "cuda:1".

    Of a GPU that includes what torch's allocator holds without using it.  None where the system does not say, and for a
    GPU that is not here ("cuda:sm90").
    """
    if device != "cpu":
        index = named_gpu(device)
        return None if index is None else _gpu_memory(index)
    found = [_system_memory(Path("/proc/meminfo")), *map(_cgroup_memory, group_folders("memory"))]
    known = [nbytes for nbytes in found if nbytes is not None]
    return min(known) if known else None


def refuse_too_large(needed: int, device: str, model: str) -> None:
    """Raise ConfigError "out-of-memory", with the numbers, if loading would take more memory than is free.

    needed: in bytes.  model: its name or path, for the error.
    """
    available = available_memory(device)
    if available is not None and needed > available:
        raise ConfigError(
            f"loading would take up to {needed / 1e9:.2f} GB on {device}, but only {available / 1e9:.2f} GB are free",
            code="out-of-memory",
            file=model,
            expected=f"at most {counted(available, 'byte')}",
            found=f"{counted(needed, 'byte')}, as `pymllm plan` predicts",
            fix="Choose smaller formats (--quant '**.layers.**=int4'), divide the model over ranks "
            "(--tensor-parallel-size), free memory, or load without this check: --no-memory-check "
            "(check_memory=False).",
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory could not be had: by Python, NumPy, C++, or torch on any device.

    An error of ours has its own words, of another rank's memory perhaps.
    """
    if isinstance(error, PymllmError):
        return False
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # torch has no class of its own for the CPU: "DefaultCPUAllocator: can't allocate memory: ...".
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def out_of_memory(doing: str, error: BaseException, *, fix: str) -> ConfigError:
    """Make the error for memory that could not be had.  doing: what needed it, as "loading".  fix: what to do."""
    device = "cpu"
    if isinstance(error, torch.OutOfMemoryError):
        number = re.search(r"\bGPU (\d+)", str(error))  # "GPU 1 has a total capacity of ..."
        device = f"cuda:{torch.cuda.current_device() if number is None else int(number[1])}"
    asked = re.search(r"allocate\s+([\d.]+ ?(?:[KMGT]i?B|bytes))", str(error))
    try:
        free = available_memory(device)
    except (RuntimeError, AssertionError):
        free = None  # the device does not say any more
    return ConfigError(
        f"{doing} has run out of memory on {device}",
        code="out-of-memory",
        expected=f"{asked[1]} more" if asked else None,
        found=None if free is None else f"{free / 1e9:.2f} GB free",
        fix=fix,
    )


def _gpu_memory(index: int) -> int:
    """Return how many bytes of a GPU are free, or held by torch's allocator without use."""
    free, _ = torch.cuda.mem_get_info(index)
    return int(free + torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index))


def _system_memory(meminfo: Path) -> int | None:
    """Read how many bytes the kernel could give without swapping; None where /proc/meminfo does not say."""
    try:
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _cgroup_memory(group: Path) -> int | None:
    """Compute how many bytes are left of one control group's limit; None without a limit."""
    for limit_file, used_file, stat_file, cache in CGROUPS:
        try:
            limit, used = (int((group / file).read_text()) for file in (limit_file, used_file))
            stat = dict(line.split() for line in (group / stat_file).read_text().splitlines())
        except (OSError, ValueError):  # absent, or "max"
            continue
        return max(limit - used + int(stat.get(cache, 0)), 0)
    return None


def keep_freed_memory() -> None:
    """Have the C library keep freed blocks of up to 32 MB for those that come, until `return_freed_memory`.

    glibc maps large blocks one by one, so that each is touched anew, a fault a page: until it frees one of that size,
    after which it takes smaller ones from what it has (mallopt(3), M_MMAP_THRESHOLD).
    """
    if _malloc_trim() is not None:
        torch.empty(LARGEST_KEPT, dtype=torch.uint8)


def return_freed_memory() -> None:
    """Ask the C library to return freed memory to the system.

    glibc keeps freed blocks of up to 32 MB for itself; over a load of many layers that adds a tenth to the peak.
    With any other C library this does nothing.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
