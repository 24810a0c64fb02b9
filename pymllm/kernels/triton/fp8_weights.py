"""float8_e4m3fn weights, activations left in 16-bit floats (W8A16): for GPUs without fp8 units, or for exactness."""

# O out_features, I in_features

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from pymllm.kernels.canonical import CanonicalWeight, Fp8Type, Fp8Weight
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.registry import Packed
from pymllm.kernels.triton.launch import inline
from pymllm.kernels.triton.linear_cases import EVEN, ODD
from pymllm.kernels.triton.pair_assembly import Assembly, decode_pairs, multiply_bfloat16, shift, signed_pair
from pymllm.kernels.triton.requirements import why_not_float_activations
from pymllm.kernels.triton.weight_only import WHOLE, Coding, coder
from pymllm.kernels.triton.weight_only_linear import WeightOnlyLinear, order_of
from pymllm.kernels.triton.words import Order, pack_words, span_of, unpack_words

if TYPE_CHECKING:
    import triton.language as tl


TO_THE_120TH = (127 + 120) << 7  # 2^120 in bfloat16


class TritonFp8(WeightOnlyLinear):
    """float8_e4m3fn weights with a scale for the tensor, each channel or each block."""

    name = "triton_fp8"
    layout = "triton_fp8 words"

    def why_not(self, problem: LinearProblem) -> str | None:
        kind = problem.weight
        if not isinstance(kind, Fp8Type):
            return f"multiplies fp8 only, the weight is {kind}"
        if span_of(math.gcd(kind.block[1], problem.in_features)) is None:
            return f"needs multiples of 16 inputs, the weight has {problem.in_features} in {kind}"
        return why_not_float_activations(problem, kind.activations)

    def pack(self, weight: CanonicalWeight, problem: LinearProblem) -> Packed:
        assert isinstance(weight, Fp8Weight)
        codes = weight.weight.view(torch.uint8)
        # A NaN makes the sum of its row NaN, for whatever inputs.
        has_nan = (codes & 0x7F == 0x7F).any(dim=-1)
        packed = {
            "words": pack_words(codes, 8, order_of(problem)),
            "scales": weight.scales.t().contiguous(),
            "row_scales": torch.where(has_nan, math.nan, 1.0),
        }
        if weight.input_scales is not None:
            packed["input_scales"] = weight.input_scales
        return packed

    def unpack(self, packed: Packed, problem: LinearProblem) -> CanonicalWeight:
        kind = problem.weight
        assert isinstance(kind, Fp8Type)
        return Fp8Weight(
            unpack_words(packed["words"], 8, order_of(problem)).view(torch.float8_e4m3fn),
            packed["scales"].t().contiguous(),
            kind.block,
            kind.activations,
            packed.get("input_scales"),
        )

    def coding(self, packed: Packed, problem: LinearProblem) -> str:
        kind = problem.weight
        assert isinstance(kind, Fp8Type)
        order = order_of(problem)
        return f"fp8 {order.span} {order.beside} {kind.block[1] or WHOLE} {kind.block[0] or WHOLE}"

    def examples(self) -> Sequence[CanonicalWeight]:
        blocks = ((*EVEN, (128, 128)), (*EVEN, (1, 0)), (*EVEN, (0, 0)), (*ODD, (128, 128)))
        return [
            Fp8Weight(
                torch.empty((out_features, in_features), dtype=torch.float8_e4m3fn, device="meta"),
                torch.empty(
                    (
                        math.ceil(out_features / (block[0] or out_features)),
                        math.ceil(in_features / (block[1] or in_features)),
                    ),
                    device="meta",
                ),
                block,
            )
            for out_features, in_features, block in blocks
        ]


@coder("fp8")
def fp8_coding(span: str, beside: str, group: str, rows: str) -> Coding:
    order = Order(int(span), int(beside))
    return Coding(e4m3, 8, order, int(group), int(rows), assemblies=e4m3_assembly)


@functools.cache
def e4m3_assembly(dtype: torch.dtype) -> Assembly:
    """Decode by moving the fields to those of the wider float.

    A power of two evens the exponents' bias, in bfloat16 at once: there sums would be too small. The bytes of NaNs
    become 480: rows that have any are multiplied by NaN.
    """
    moved, mask = (4, "0x07F007F0") if dtype is torch.bfloat16 else (1, "0x3F803F80")
    even = multiply_bfloat16(TO_THE_120TH) if dtype is torch.bfloat16 else ""

    def pair(n: int) -> str:
        size = f"{shift('p', 8 * n - 8 + moved)} and.b32 p, p, {mask};"
        return f"{signed_pair(size, 8 * n + 7)} {even}"

    return decode_pairs(4, pair, bias=-0.0, factor=1.0 if even else 2.0**8)


@inline
def e4m3(words, n: tl.constexpr):
    """Decode code n: sign, exponent and fraction move to their places in a float32; 2^120 evens the exponents' bias."""
    top = words << (24 - 8 * n)
    bits = (top & -2147483648) | ((top >> 4) & 0x07F00000)
    value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where((top & 0x7F000000) == 0x7F000000, float("nan"), value)
