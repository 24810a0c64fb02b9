"""A weight converted and packed a slab of its outputs at a time, so that its codes stay in the processor's caches.

The canonical codes of a whole weight take a byte each, twice what a 4-bit checkpoint stores, in memory that nobody has
touched. Nothing of a format or a kernel is known here: stored tensors are cut as their `WeightSpec`s say, the method
converts a slab as it would a layer of so many outputs, and the kernel packs it into its place.
"""

# O out_features, I in_features

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pymllm.config import Execution
from pymllm.kernels.canonical import CanonicalWeight, CodebookWeight, IntWeight
from pymllm.kernels.native.integer import BLOCK_ROWS, NativeIntegerLinear, empty_blocks
from pymllm.kernels.registry import Operation
from pymllm.quantization.binding import BoundWeight, choose_kernel
from pymllm.weights.spec import Axis, LinearShape, Span, WeightSpec

SLAB_BYTES = 1 << 20  # of codes, for each thread: what the second-level cache of a core holds


def bind_in_slabs(
    method: Any, tensors: Mapping[str, Tensor], shape: LinearShape, execution: Execution, operation: Operation
) -> BoundWeight | None:
    """Convert and pack a layer's stored tensors a slab at a time: what is packed is that of the whole, bit for bit.

    method: that of the layer.  tensors: this rank's, by the names of its specs.
    Returns None where the weight has to be packed as a whole: it is small, or its parts or its kernel do not divide so.
    """
    specs = method.weight_specs(shape)
    # A weight that is quantised anew is four bytes a code before, in each of several steps.
    width = 1 if method.source_method() is method else 4
    rows = _rows_of_a_slab(specs, tensors, shape, width)
    if rows is None:
        return None
    bound: BoundWeight | None = None
    kept: dict[str, list[Tensor]] = {}
    for part, start, size in _slabs(shape, rows):
        cut = {spec.name: _cut(tensors[spec.name], spec, part, start, size) for spec in specs}
        alone = replace(shape, outputs=(Span.full(size),), parts=(shape.names[part],))
        weight = method.to_canonical(cut, alone)
        if bound is None:
            bound = _frame(weight, shape, execution, operation)
            if bound is None:
                return None
        elif weight.type != bound.problem.weight or not _same_order(weight, bound):
            return None  # of several parts, which cannot be one weight: packing it as a whole says why
        if isinstance(weight, IntWeight):
            weight = replace(weight, input_order=None)
        blocks = bound.packed["blocks"][start // BLOCK_ROWS : -(-(start + size) // BLOCK_ROWS)]
        problem = replace(bound.problem, out_features=size)
        for name, tensor in bound.selection.kernel.pack(weight, problem, blocks).items():
            kept.setdefault(name, []).append(tensor)
    assert bound is not None
    packed = {
        name: bound.packed["blocks"]
        if name == "blocks"
        else torch.cat(slabs)
        if name in NativeIntegerLinear.by_rows
        else slabs[0].clone()
        for name, slabs in kept.items()
    }
    return replace(bound, packed=packed)


def _frame(
    weight: CanonicalWeight, shape: LinearShape, execution: Execution, operation: Operation
) -> BoundWeight | None:
    """Choose the kernel for a weight of which a slab is given, with empty blocks; None: it is packed as a whole."""
    if not isinstance(weight, IntWeight | CodebookWeight):
        return None
    if weight.input_scales is not None and len(shape.outputs) > 1:
        return None  # the kernel wants those of all parts
    size = (shape.out_features_local, shape.in_features_local)
    selection, problem = choose_kernel(weight.type, size, execution, operation)
    if not isinstance(selection.kernel, NativeIntegerLinear):
        return None
    order = weight.input_order if isinstance(weight, IntWeight) else None
    return BoundWeight(selection, problem, {"blocks": empty_blocks(problem)}, order)


def _same_order(weight: CanonicalWeight, bound: BoundWeight) -> bool:
    mine = weight.input_order if isinstance(weight, IntWeight) else None
    if mine is None or bound.input_order is None:
        return mine is bound.input_order
    return torch.equal(mine, bound.input_order)


def _rows_of_a_slab(
    specs: Sequence[WeightSpec], tensors: Mapping[str, Tensor], shape: LinearShape, width: int
) -> int | None:
    """Count the outputs of a slab, `width` bytes a code; None where the tensors cannot be cut, or need not be."""
    outputs, inputs = shape.out_features_local, shape.in_features_local
    whole = math.lcm(
        BLOCK_ROWS, *(dim.granule or 1 for spec in specs for dim in spec.dims if dim.axis is Axis.OUT)
    )
    wanted = SLAB_BYTES * torch.get_num_threads() // max(inputs * width, 1)
    rows = max(wanted // whole, 1) * whole
    if rows >= outputs or any(span.size % whole for span in shape.outputs[:-1]):
        return None
    for spec in specs:
        if not tensors[spec.name].is_cpu:
            return None
        for dim, stored in zip(spec.dims, tensors[spec.name].shape, strict=True):
            if dim.flat or dim.axis is Axis.EXPERT:
                return None
            if dim.axis is Axis.OUT and (dim.spread or not dim.granule or stored != dim.stored(outputs)):
                return None
    return rows


def _slabs(shape: LinearShape, rows: int) -> Iterator[tuple[int, int, int]]:
    """Yield each slab's part, first output among those of all parts, and size.  No slab has outputs of two parts."""
    start = 0
    for part, span in enumerate(shape.outputs):
        for first in range(0, span.size, rows):
            yield part, start + first, min(rows, span.size - first)
        start += span.size


def _cut(tensor: Tensor, spec: WeightSpec, part: int, start: int, size: int) -> Tensor:
    """Cut a slab's share of a stored tensor, as a view."""
    for axis, dim in enumerate(spec.dims):
        if dim.axis is Axis.PART:
            tensor = tensor.narrow(axis, part, 1)
        elif dim.axis is Axis.OUT:
            first = dim.stored(start)
            tensor = tensor.narrow(axis, first, dim.stored(start + size) - first)
    return tensor
