"""Memory for packed weights, in huge pages.

Decoding reads every weight once a token, and 2 % slower from pages of 4 KiB. Memory that was in use before, while
loading, gets no huge pages any more; so a large weight has a mapping of its own: as many huge pages as it fills, and
small pages for its end.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20


def empty_packed(shape: Sequence[int]) -> Tensor:
    """Allocate an uninitialised uint8 tensor on the CPU, 64-byte aligned."""
    size = math.prod(shape)
    if size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(tuple(shape), dtype=torch.uint8)
    memory, start = map_memory(size)
    return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=start).view(tuple(shape))


def map_memory(size: int) -> tuple[mmap.mmap, int]:
    """Map memory for `size` bytes, zeros.  Returns it, and where in it the first huge page begins."""
    # The mapping is larger than the weight: memory before the first huge page and behind the end is never written to,
    # and so costs nothing.
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % HUGE_PAGE
    with contextlib.suppress(OSError):  # this is only advice, which a kernel without huge pages refuses
        memory.madvise(mmap.MADV_HUGEPAGE, start, size // HUGE_PAGE * HUGE_PAGE)
    return memory, start
