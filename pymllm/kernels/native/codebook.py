"""Linear layers over 4-bit codes of a codebook on the CPU, in C++: bitsandbytes' nf4 and fp4.

Activations stay floats: `kernels/float_linear.h` looks codes up in a register and multiplies in float32. Weights are
packed as the reference packs them, so that an embedding may share the table.
"""

# O out_features, I in_features, G group_size

from __future__ import annotations

import torch
from torch import Tensor

from pymllm.errors import ConfigError
from pymllm.kernels.canonical import CanonicalWeight, CodebookType, CodebookWeight
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.native.addresses import CODE, floats_address
from pymllm.kernels.native.extension import native_missing_reason
from pymllm.kernels.native.float_linear import run_native, why_not_floats
from pymllm.kernels.native.fp8 import BLOCK_INPUTS
from pymllm.kernels.reference.linear import ReferenceLinear
from pymllm.kernels.registry import Packed

CODES = 16  # of 4 bits
PACKING = ReferenceLinear()


class NativeCodebook:
    """The kernel for codes of nf4 or fp4 × activations of any float dtype, in float32."""

    name = "native_codebook"
    device_type = "cpu"
    layout = PACKING.layout

    def why_not(self, problem: LinearProblem) -> str | None:
        kind = problem.weight
        if not isinstance(kind, CodebookType) or kind.codebook not in ("nf4", "fp4"):
            return f"multiplies codes of nf4 or fp4 only, the weight is {kind}"
        floats = why_not_floats(problem, kind.activations)
        if floats is not None:
            return floats
        if kind.scales is not torch.float32:
            return f"takes scales in float32, the weight has {kind.scales}"
        if kind.group_size < problem.in_features and kind.group_size % BLOCK_INPUTS:
            return f"takes groups of a multiple of {BLOCK_INPUTS}, the weight has {kind.group_size}"
        if problem.in_features % 2:
            return f"takes inputs in pairs, not {problem.in_features}"
        return native_missing_reason()

    def numerics(self, problem: LinearProblem) -> str:
        return "weights dequantised exactly, inputs as they are, float32 arithmetic"

    def pack(self, weight: CanonicalWeight, problem: LinearProblem) -> Packed:
        assert isinstance(weight, CodebookWeight)
        groups = -(-problem.in_features // weight.group_size)
        if weight.row_scales is not None or tuple(weight.scales.shape) != (problem.out_features, groups):
            raise ConfigError(
                f"the scales must be [{problem.out_features}, {groups}] without scales of rows, "
                f"not {list(weight.scales.shape)}{'' if weight.row_scales is None else ' with scales of rows'}",
                code=CODE,
            )
        return {name: tensor.contiguous() for name, tensor in PACKING.pack(weight, problem).items()}

    def unpack(self, packed: Packed, problem: LinearProblem) -> CanonicalWeight:
        return PACKING.unpack(packed, problem)

    def run(self, packed: Packed, problem: LinearProblem, x: Tensor, bias: Tensor | None) -> Tensor:
        outputs, inputs = problem.out_features, problem.in_features
        side = problem.weight.group_size  # type: ignore[union-attr]
        block = (1, side if side < inputs else 0)
        scales = floats_address("the scales", packed["scales"], outputs * -(-inputs // side))
        table = floats_address("the codebook", packed["table"], CODES)
        return run_native(problem, x, bias, packed["codes"], scales, block, 0, table)
