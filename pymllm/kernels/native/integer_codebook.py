"""Linear layers over codebooks of integers on the CPU, in C++: GGUF's IQ types, and the base of fp4.

A table in a register turns 4-bit codes into integers, which are multiplied as integers are; the codebook's unit goes
into the rows' factors.
"""

# O out_features, I in_features, G group_size

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from pymllm.errors import ConfigError
from pymllm.kernels.canonical import CanonicalWeight, CodebookType, CodebookWeight
from pymllm.kernels.codebooks import INTEGER_CODEBOOKS
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.native.addresses import CODE
from pymllm.kernels.native.integer import (
    SCALES,
    NativeIntegerLinear,
    device_reason,
    group_reason,
    unpack_blocks,
)
from pymllm.kernels.registry import Packed


class NativeIntegerCodebook(NativeIntegerLinear):
    """The kernel for codes of a codebook of integers, with scales as the checkpoint has them and a factor a row."""

    name: ClassVar[str] = "native_integer_codebook"
    codebooks: ClassVar[tuple[str, ...]] = tuple(name for name in INTEGER_CODEBOOKS if name != "e2m1")

    def why_not(self, problem: LinearProblem) -> str | None:
        kind = problem.weight
        if not isinstance(kind, CodebookType) or kind.codebook not in self.codebooks:
            return f"multiplies codes of {' or '.join(self.codebooks)} only, the weight is {kind}"
        if problem.compute == "checkpoint" and kind.activations != "float":
            return f"keeps its inputs as floats, compute=checkpoint wants them quantised ({kind.activations})"
        if kind.scales not in SCALES:
            return f"takes scales in e8m0, e4m3 or a float dtype, the weight has {kind.scales}"
        return group_reason(kind, problem.in_features, problem.out_features) or device_reason(problem)

    def pack(self, weight: CanonicalWeight, problem: LinearProblem, blocks: Tensor | None = None) -> Packed:
        assert isinstance(weight, CodebookWeight)
        codebook = INTEGER_CODEBOOKS[weight.codebook]
        if not weight.table.is_meta and not codebook.is_table(weight.table):
            raise ConfigError(
                f"the weight's table must be that of {weight.codebook}, not {weight.table.tolist()}",
                code=CODE,
            )
        if weight.scales.element_size() == 1 and not weight.scales.is_meta and has_nan(weight.scales):
            raise ConfigError("some scales of the weight are NaN", code=CODE)
        packed = {**super().pack(weight, problem, blocks), "table": weight.table}
        rows, unit = weight.row_scales, codebook.unit
        if rows is not None:
            packed["row_scales"] = rows
            # A plan needs the shape alone, and torch's products of meta tensors would load its compiler (3 s).
            packed["row_factors"] = (
                rows.float() if unit == 1 or rows.is_meta else rows.float() * unit
            ).contiguous()
        elif unit != 1:
            packed["row_factors"] = weight.table.new_full((problem.out_features,), unit, dtype=torch.float32)
        return packed

    def unpack(self, packed: Packed, problem: LinearProblem) -> CanonicalWeight:
        kind = problem.weight
        assert isinstance(kind, CodebookType)
        codes, scales, _ = unpack_blocks(packed["blocks"], kind.scales, True, problem)
        row_scales: Tensor | None = packed.get("row_scales")
        return CodebookWeight(
            codes,
            packed["table"],
            scales,
            kind.codebook,
            kind.group_size,
            row_scales,
            kind.activations,
            packed.get("input_scales"),
        )


def has_nan(scales: Tensor) -> bool:
    """Tell whether 8-bit scales, e4m3 or e8m0, have NaN among them."""
    bits = scales.view(torch.uint8)
    return bool((bits == 255 if scales.dtype is torch.float8_e8m0fnu else (bits & 127) == 127).any())
