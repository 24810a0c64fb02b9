"""Codes out of a checkpoint's words and bytes, in C++: one byte a code, outputs first.

`kernels/stored_codes.h` does the work. Each function has a twin in torch beside the format that needs it, which runs
where `splits_here` says no: on another device, or without native kernels.
"""

# R rows, C columns

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pymllm.kernels.native.addresses import address, unfit
from pymllm.kernels.native.extension import native, native_available


def splits_here(stored: Tensor) -> bool:
    """Tell whether the functions of this file take a tensor: on the CPU, with elements side by side in its rows."""
    return (
        stored.is_cpu
        and stored.ndim == 2
        and stored.numel() > 0
        and stored.stride(1) == 1
        and (stored.shape[0] == 1 or stored.stride(0) >= stored.shape[1])
        and native_available()
    )


def split_fields(stored: Tensor, bits: int, *, planes: bool = False) -> Tensor:
    """Split bytes into fields of 1, 2 or 4 bits: [R, C] uint8 -> [R, C·8/bits], the lowest field first.

    planes: the lowest fields of all bytes of a row, then the next ones; else all of a byte, then those of the next.
    """
    where, rows, columns, stride = _matrix(stored, torch.uint8)
    codes = torch.empty((rows, columns * (8 // bits)), dtype=torch.uint8)
    native().split_fields(
        where, rows, columns, stride, bits, planes, codes.data_ptr(), torch.get_num_threads()
    )
    return codes


def split_rows(words: Tensor, bits: int) -> Tensor:
    """Split words along their rows: [R, C] int32 -> [C, R·32/bits], of each column the fields of its words.

    bits: 2, 4 or 8.  The lowest field of a word is first.
    """
    where, rows, columns, stride = _matrix(words, torch.int32)
    codes = torch.empty((columns, rows * (32 // bits)), dtype=torch.uint8)
    native().split_rows(where, rows, columns, stride, bits, codes.data_ptr(), torch.get_num_threads())
    return codes


def split_columns(words: Tensor, order: Sequence[int]) -> Tensor:
    """Split words of eight 4-bit fields along their columns: [R, C] int32 -> [8·C, R].

    order: where each field goes among the eight of its word, the lowest field first.
    """
    where, rows, columns, stride = _matrix(words, torch.int32)
    codes = torch.empty((8 * columns, rows), dtype=torch.uint8)
    native().split_columns(
        where, rows, columns, stride, list(order), codes.data_ptr(), torch.get_num_threads()
    )
    return codes


def _matrix(stored: Tensor, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Return where a matrix lies, its rows, its columns and the elements from one row to the next."""
    if stored.dtype is not dtype or not splits_here(stored):
        raise unfit("stored codes", stored, ("rows", "columns"), dtype)
    rows, columns = stored.shape
    stride = stored.stride(0) if rows > 1 else columns
    size = ((rows - 1) * stride + columns) * dtype.itemsize
    return address("stored codes", stored, size), rows, columns, stride
