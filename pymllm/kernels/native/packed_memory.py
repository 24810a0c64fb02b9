"""Memory for packed weights, in huge pages.

What decoding reads passes by once a token, and from 4 KiB pages it does so 2 % slower. Memory that was in use before,
while loading, gets no huge pages any more, so that a large weight has a mapping of its own: as many huge pages as it
fills, and small ones for its end.
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
    """An uninitialised uint8 tensor on the CPU, 64-byte aligned."""
    size = math.prod(shape)
    if size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(tuple(shape), dtype=torch.uint8)
    # Memory that nothing is written to costs nothing: what lies before the first huge page, and behind the end.
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE
    with contextlib.suppress(OSError):  # a kernel without them: advice only
        memory.madvise(mmap.MADV_HUGEPAGE, start, size // HUGE_PAGE * HUGE_PAGE)
    return whole[start : start + size].view(tuple(shape))
