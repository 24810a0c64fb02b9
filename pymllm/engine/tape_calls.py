"""Native calls that stand for torch's operations on a tape: the same, bit for bit, without the way to torch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pymllm.kernels.native.extension import isa_code, native
from pymllm.kernels.native.float_linear import FLOAT_TYPES

aten = torch.ops.aten
# By the numbers of kernels/pointwise.h.
COPY = 0
POINTWISE = {aten.neg.default: 1, aten.add.Tensor: 2, aten.sub.Tensor: 3, aten.mul.Tensor: 4}
COPIES = (aten.clone.default, aten._to_copy.default)
SIDES = 4  # the most dimensions of a pointwise call


def call_natively(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
    """Make a native call that does what `func` did, which records it.  Returns False if there is no such call.

    There are calls for the operations that decoders have: sums, products and copies, float32 logits, and rows of a
    table of sines. If torch replays these, each costs 3 to 6 us.
    """
    if not isinstance(result, Tensor) or result.device.type != "cpu":
        return False
    if func is aten.cat.default:
        return _concatenate(result, *args)
    if func in POINTWISE:
        return kwargs.get("alpha", 1) == 1 and _pointwise(POINTWISE[func], result, *args)
    if func in COPIES and args[0].dtype is result.dtype:
        return _pointwise(COPY, result, args[0])
    if not result.is_contiguous():
        return False
    if func is aten._to_copy.default:
        x = args[0]
        if x.dtype not in FLOAT_TYPES or result.dtype is not torch.float32 or not x.is_contiguous():
            return False
        native().widen(
            x.data_ptr(),
            result.data_ptr(),
            FLOAT_TYPES[x.dtype],
            x.numel(),
            isa_code(None),
            torch.get_num_threads(),
        )
        return True
    if func is aten.index.Tensor:
        table, ids = args[0], args[1][0]
        if len(args[1]) != 1 or ids.dtype is not torch.int64 or not ids.is_contiguous():
            return False
        if not table.is_contiguous() or table.ndim != 2:
            return False
        row_bytes = table.shape[1] * table.element_size()
        native().copy_rows(
            table.data_ptr(), table.shape[0], row_bytes, ids.data_ptr(), ids.numel(), result.data_ptr()
        )
        return True
    return False


def _concatenate(result: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> bool:
    """Copy each tensor to its place in the result."""
    tensors = [tensor for tensor in tensors if tensor.numel()]
    if any(tensor.ndim != result.ndim or not _fits(result, tensor) for tensor in tensors):
        return False
    places = result.split([tensor.shape[dim] for tensor in tensors], dim)
    return all(_pointwise(COPY, place, tensor) for place, tensor in zip(places, tensors, strict=True))


def _fits(out: Tensor, x: Tensor) -> bool:
    return out.ndim <= SIDES and out.dtype in FLOAT_TYPES and x.dtype is out.dtype and x.device == out.device


@functools.cache
def _number(value: float, dtype: torch.dtype) -> Tensor:
    """Return a tensor of a number, which stays where it is."""
    return torch.tensor(value, dtype=dtype)


def _pointwise(operation: int, out: Tensor, x: Any, y: Any = None) -> bool:
    """Compute out = x or x o y, broadcast.  y: a tensor, or a number that the tensors' type holds exactly."""
    if isinstance(y, (int, float)) and out.dtype in FLOAT_TYPES:
        number = _number(float(y), out.dtype)
        # torch multiplies a float32 by the number's nearest float32; of fewer bits, the number must be one.
        if out.dtype is not torch.float32 and float(number) != float(y):
            return False
        y = number
    operands = [operand for operand in (x, y) if operand is not None]
    if any(not isinstance(operand, Tensor) or not _fits(out, operand) for operand in operands):
        return False
    wide = [operand.expand(out.shape) for operand in operands]
    sizes = (1,) * (SIDES - out.ndim) + tuple(out.shape)
    strides = [(0,) * (SIDES - out.ndim) + tensor.stride() for tensor in (*wide, out)]
    native().pointwise(
        operation,
        x.data_ptr(),
        wide[1].data_ptr() if len(wide) > 1 else 0,
        out.data_ptr(),
        FLOAT_TYPES[out.dtype],
        sizes,
        strides[0],
        strides[-2],
        strides[-1],
        torch.get_num_threads(),
    )
    return True
