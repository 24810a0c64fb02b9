"""The memory of recorded steps: one region for the intermediate tensors of all tapes.

One tape plays at a time, and nobody needs a step's tensors after it. So every tape has the region to itself, and within
a step a tensor takes the place of one that is gone, as it did when the step was recorded. What all tapes take together
is what the largest step takes at once.
"""

from __future__ import annotations

import weakref
from bisect import insort
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

# How much a step's tensors may take at once. The region is so large, but only what is written to takes real memory.
MAX_BYTES = 64 << 20

# Where tensors begin, as torch's own do.
ALIGNMENT = 64


class NoRoom(Exception):
    """The refusal of a tensor that the region has no room for."""


class StepMemory:
    """A region of `size` bytes, for the steps that are recorded one after the other.

    A tensor that outlives its step (layers may keep one, to know it when they see it again) keeps its place, but finds
    other numbers there once a step of another tape has played.
    """

    def __init__(self, size: int | None = None) -> None:
        self._size = MAX_BYTES if size is None else size
        # Asked for when the first step is recorded.
        self._region: np.ndarray | None = None
        self._base = -self._size
        # (begin, end) of what is taken, in order, and who calls when an owner is gone.
        self._taken: list[tuple[int, int]] = []
        self._owners: dict[int, weakref.ref[np.ndarray]] = {}

    def __contains__(self, tensor: Tensor) -> bool:
        return self._base <= tensor.data_ptr() < self._base + self._size

    def take(self, like: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """Make a tensor with the shape, strides and type of another.  NoRoom: there is none, in the region or for it.

        Its memory is taken until it and all views of it are gone. Returns it, and what fills it with NaN.
        """
        region = self._reserve() if self._region is None else self._region
        size = _extent(like)
        begin = 0
        for other, end in self._taken:
            if other - begin >= size:
                break
            begin = -(-end // ALIGNMENT) * ALIGNMENT
        if begin + size > self._size:
            raise NoRoom(f"its intermediate results take more than {self._size >> 20} MiB")
        owner, place, taken = region[begin : begin + size], (begin, begin + size), self._taken
        insort(taken, place)
        owners = self._owners

        def gone(_: object) -> None:
            taken.remove(place)
            del owners[begin]

        owners[begin] = weakref.ref(owner, gone)

        def spoil() -> None:
            # All bits set are NaN in every float type.
            region[begin : begin + size] = 255

        return _over(owner, like), spoil

    def _reserve(self) -> np.ndarray:
        try:
            raw = np.empty(self._size + ALIGNMENT, dtype=np.uint8)
        except MemoryError:
            raise NoRoom(f"there are no {self._size >> 20} MiB for its intermediate results") from None
        start = -raw.ctypes.data % ALIGNMENT
        self._region = raw[start : start + self._size]
        self._base = self._region.ctypes.data
        return self._region

    def alias(self, tensor: Tensor) -> Tensor:
        """Make a tensor at the place of another in the region, which takes no memory from others."""
        assert self._region is not None
        begin = tensor.data_ptr() - self._base
        return _over(self._region[begin : begin + _extent(tensor)], tensor)


def _extent(tensor: Tensor) -> int:
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in steps)) * tensor.element_size()


def _over(memory: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(memory).view(like.dtype).as_strided(like.shape, like.stride())
