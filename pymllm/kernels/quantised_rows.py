"""Activations that are quantised already, handed from the kernel that makes them to the one that multiplies them.

A linear kernel that quantises its input says how (`input_codes`); an elementwise kernel that can do so gives it codes
in place of floats, and saves the pass over memory between the two. The codes are those that the linear kernel would
make.
"""

# I inputs of a linear layer, G inputs that share a scale

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowCodes:
    """The kind of codes that rows become.

    integer: int8 codes, else e4m3.  group: how many inputs share a scale; 0: the whole row.
    """

    integer: bool
    group: int = 0

    def __str__(self) -> str:
        return f"{'int8' if self.integer else 'e4m3'} {f'in groups of {self.group}' if self.group else 'by rows'}"


@dataclass(frozen=True, eq=False)
class QuantisedRows:
    """Rows as codes and scales.

    codes: [*, I] int8 or e4m3.  scales: [rows, I/G] float32, in any order.
    dtype: that of the values, and of their products.
    """

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype
