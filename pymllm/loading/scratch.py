"""Memory that stored tensors are read into: a unit's takes the place of another's, so that pages are touched once.

A page's first touch costs as much as reading three from the page cache. Whether memory can be used again is not
guessed: a packed weight that is the stored tensor itself keeps it, and the next unit gets other memory.
"""

from __future__ import annotations

import functools
import math
import mmap
import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pymllm.kernels.native.packed_memory import HUGE_PAGE, empty_packed, map_memory
from pymllm.layers.held import HeldWeight, WeightHolder
from pymllm.quantization.converted import ConvertedLinearMethod
from pymllm.quantization.method import LinearMethodBase
from pymllm.weights.spec import LinearShape

if TYPE_CHECKING:
    from pymllm.loading.match import Unit

LEAST = 1 << 16  # bytes of a tensor that takes scratch: what is small may be kept as it is
ALIGNMENT = 64
MINE = 2  # references to memory that nobody uses: the attribute, and the argument of `getrefcount`


class Scratch:
    """Memory of one unit's stored tensors at a time."""

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None
        self._start = self._size = self._used = 0

    def begin(self, nbytes: int, tensors: int) -> None:
        """Make room for a unit of so many bytes in so many tensors.  Memory that is still in use is left alone."""
        wanted = nbytes + tensors * ALIGNMENT
        self._used = 0
        if self._memory is not None and self._size >= wanted and sys.getrefcount(self._memory) == MINE:
            return
        self._memory = None  # before new memory is taken
        self._memory, self._start = map_memory(wanted)
        self._size = wanted

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return memory for one tensor of the unit, with any values."""
        nbytes = math.prod(shape) * dtype.itemsize
        assert self._memory is not None and self._used + nbytes <= self._size
        start = self._start + self._used
        self._used += -(-nbytes // ALIGNMENT) * ALIGNMENT
        octets = torch.frombuffer(self._memory, dtype=torch.uint8, count=nbytes, offset=start)
        return octets.view(dtype).view(tuple(shape))


def scratch_parameters(holder: WeightHolder) -> set[tuple[int, str]]:
    """List what of a holder is only read to be packed: the parameters, by the ids of their modules, and their names."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return set()
    found = set()
    for weight in holder.held():
        if _is_repacked(weight):
            found |= {(id(weight.stored_in), name) for name in _large(weight)}
    return found


def scratch_bytes(unit: Unit) -> int:
    """Count the bytes of `scratch_parameters`, from what is stored: also of a unit that is packed already."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return 0
    read_only: Counter[tuple[int, str]] = Counter()
    for weight in unit.holder.held():
        if _is_repacked(weight):
            read_only |= Counter({(id(weight.stored_in), name): 1 for name in _names(weight)})
    sizes: Counter[tuple[int, str]] = Counter()
    for placement in unit.placements:
        if read_only[id(placement.module), placement.param]:
            slot, tensor = placement.slot, placement.tensor
            sizes[id(placement.module), placement.param] += (
                slot.elements * tensor.nbytes // max(math.prod(tensor.shape), 1)
            )
    return sum(size for size in sizes.values() if size >= LEAST)


def _names(weight: HeldWeight) -> list[str]:
    shape = weight.shape if isinstance(weight.shape, LinearShape) else weight.shape.one
    return [spec.name for spec in weight.method.weight_specs(shape)]


def _large(weight: HeldWeight) -> list[str]:
    params = {name: weight.stored_in._parameters.get(name) for name in _names(weight)}
    return [name for name, param in params.items() if param is not None and param.nbytes >= LEAST]


def _is_repacked(weight: HeldWeight) -> bool:
    """Tell whether packing makes other tensors than the stored ones, as far as the kind of weight tells."""
    shape = weight.shape if isinstance(weight.shape, LinearShape) else weight.shape.one
    return isinstance(weight.method, ConvertedLinearMethod) or _has_codes(weight.method, shape)


@functools.lru_cache(maxsize=256)
def _has_codes(method: LinearMethodBase, shape: LinearShape) -> bool:
    return method.planned(shape).type.family in ("int", "codebook")


def empty_parameter(meta: Tensor, device: torch.device) -> Tensor:
    """Allocate what stays as it is read: on the CPU in huge pages where it fills some."""
    if device.type != "cpu" or meta.nbytes < HUGE_PAGE:
        return torch.empty_like(meta, device=device)
    return empty_packed((meta.nbytes,)).view(meta.dtype).view(meta.shape)
