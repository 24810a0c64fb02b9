"""Linear layers over fp4 (e2m1) weights on the CPU, in C++: MXFP4 and NVFP4.

Twice an e2m1 value is an integer from -12 to 12, so codes are looked up in a register and multiplied as integers are;
the factor of one half goes into the rows' factors.
"""

# O out_features, I in_features, G group_size

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from pymllm.kernels.canonical import CanonicalWeight, CodebookType, CodebookWeight
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.native.integer import (
    E2M1_UNIT,
    SCALES,
    NativeIntegerLinear,
    device_reason,
    group_reason,
    unpack_blocks,
)
from pymllm.kernels.registry import Packed

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class NativeFp4(NativeIntegerLinear):
    """The kernel for fp4 codes, with scales as the checkpoint has them (e8m0, e4m3 or floats) and a factor a row."""

    name: ClassVar[str] = "native_fp4"

    def why_not(self, problem: LinearProblem) -> str | None:
        kind = problem.weight
        if not isinstance(kind, CodebookType) or kind.codebook != "e2m1":
            return f"multiplies fp4 (e2m1) only, the weight is {kind}"
        if problem.compute == "checkpoint" and kind.activations != "float":
            return (
                f"keeps activations as floats, compute=checkpoint wants them quantised ({kind.activations})"
            )
        if kind.scales not in SCALES:
            return f"takes scales in e8m0, e4m3 or a float dtype, the weight has {kind.scales}"
        return group_reason(kind, problem.in_features, problem.out_features) or device_reason(problem)

    def pack(self, weight: CanonicalWeight, problem: LinearProblem) -> Packed:
        assert isinstance(weight, CodebookWeight)
        values = torch.tensor([*E2M1, *(-value for value in E2M1)])
        if not weight.table.is_meta and not torch.equal(weight.table.float(), values):
            raise ValueError(f"the weight's table must be that of e2m1, not {weight.table.tolist()}")
        if weight.scales.element_size() == 1 and not weight.scales.is_meta and has_nan(weight.scales):
            raise ValueError("some scales of the weight are NaN")
        ones = weight.table.new_ones(problem.out_features, dtype=torch.float32)
        factors = E2M1_UNIT * (ones if weight.row_scales is None else weight.row_scales.float())
        kept = {"table": weight.table}
        if weight.row_scales is not None:
            kept["row_scales"] = weight.row_scales
        return {**super().pack(weight, problem), "row_factors": factors, **kept}

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
