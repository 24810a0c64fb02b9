"""Linear layers over fp8 e4m3 weights on the CPU, in C++: `kernels/float_linear.h` says how.

Activations stay floats. Codes become float32 in registers (through f16, which holds every code exactly) and are scaled
by block or once a row; the arithmetic is float32.
"""

# T tokens, O out_features, I in_features

from __future__ import annotations

import torch
from torch import Tensor

from pymllm.kernels.canonical import CanonicalWeight, Fp8Type, Fp8Weight, has_nan_e4m3
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.native.addresses import floats_address, unfit
from pymllm.kernels.native.extension import native_missing_reason
from pymllm.kernels.native.float_linear import run_native, why_not_floats
from pymllm.kernels.reference.linear import ReferenceEmbedding
from pymllm.kernels.registry import Packed

BLOCK_INPUTS = 64  # a scale covers a multiple of so many inputs: one register of codes
HALF_BLOCK = 32  # or these, as in MXFP8
NAN_CODE = 0x7F  # without the sign: 0xFF is NaN too
ROWS_AT_A_TIME = 4096  # bounds the memory that the search for NaN codes takes


class NativeFp8Linear:
    """The kernel for fp8 e4m3 weights × activations of any float dtype, in float32."""

    name = "native_fp8"
    device_type = "cpu"
    layout = "native_fp8"

    def why_not(self, problem: LinearProblem) -> str | None:
        kind = problem.weight
        if not isinstance(kind, Fp8Type):
            return f"multiplies fp8 only, the weight is {kind}"
        floats = why_not_floats(problem, kind.activations)
        if floats is not None:
            return floats
        if kind.block[1] % BLOCK_INPUTS and kind.block[1] != HALF_BLOCK:
            return f"takes a scale for {HALF_BLOCK} or a multiple of {BLOCK_INPUTS} inputs, the weight has {kind}"
        return native_missing_reason()

    def numerics(self, problem: LinearProblem) -> str:
        return "weights dequantised exactly, inputs as they are, float32 arithmetic"

    def pack(self, weight: CanonicalWeight, problem: LinearProblem) -> Packed:
        assert isinstance(weight, Fp8Weight)
        blocks = _blocks(*weight.shape, weight.block)
        if tuple(weight.scales.shape) != blocks or weight.scales.dtype is not torch.float32:
            raise unfit("the scales", weight.scales, blocks, torch.float32)
        packed = {"weight": weight.weight.contiguous(), "scales": weight.scales.contiguous()}
        if weight.input_scales is not None:
            packed["input_scales"] = weight.input_scales  # for `unpack`
        return packed | {"row_nan": _row_nan(packed["weight"])}

    def unpack(self, packed: Packed, problem: LinearProblem) -> CanonicalWeight:
        kind = problem.weight
        assert isinstance(kind, Fp8Type)
        return Fp8Weight(
            packed["weight"], packed["scales"], kind.block, kind.activations, packed.get("input_scales")
        )

    def run(self, packed: Packed, problem: LinearProblem, x: Tensor, bias: Tensor | None) -> Tensor:
        block, outputs = problem.weight.block, problem.out_features  # type: ignore[union-attr]
        # A scale a row is what most have, and not worth a call.
        rows, columns = (outputs, 1) if block == (1, 0) else _blocks(outputs, problem.in_features, block)
        scales = floats_address("the scales", packed["scales"], rows * columns)
        row_nan = floats_address("row_nan", packed["row_nan"], outputs)
        return run_native(problem, x, bias, packed["weight"], scales, block, row_nan)


class NativeFp8Embedding(NativeFp8Linear):
    """Rows of the tensors that `NativeFp8Linear` multiplies, so that a tied head shares them."""

    def numerics(self, problem: LinearProblem) -> str:
        return "rows dequantised exactly"

    def run(self, packed: Packed, problem: LinearProblem, ids: Tensor) -> Tensor:  # type: ignore[override]
        return ReferenceEmbedding().run(packed, problem, ids)


def _blocks(out_features: int, in_features: int, block: tuple[int, int]) -> tuple[int, int]:
    """Count the scales of a weight, along each axis."""
    side_out, side_in = block
    return -(-out_features // side_out) if side_out else 1, -(-in_features // side_in) if side_in else 1


def _row_nan(weight: Tensor) -> Tensor:
    """Mark the rows with a NaN code, whose product with anything is NaN.  Returns [O] float32: NaN for such, else 0."""
    if weight.is_meta:
        return torch.empty(weight.shape[0], dtype=torch.float32, device="meta")
    row_nan = torch.zeros(weight.shape[0], dtype=torch.float32)
    if not has_nan_e4m3(weight):
        return row_nan
    for codes, rows in zip(
        weight.view(torch.uint8).split(ROWS_AT_A_TIME), row_nan.split(ROWS_AT_A_TIME), strict=True
    ):
        rows.masked_fill_((codes & NAN_CODE).eq(NAN_CODE).any(dim=1), torch.nan)
    return row_nan
