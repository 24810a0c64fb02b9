"""float8_e4m3fn weights, activations left in 16-bit floats (W8A16): for GPUs without fp8 units, or for exactness."""

# O out_features, I in_features

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from pymllm.kernels.canonical import CanonicalWeight, Fp8Type, Fp8Weight
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.registry import Packed
from pymllm.kernels.triton.launch import inline
from pymllm.kernels.triton.linear_cases import EVEN, ODD
from pymllm.kernels.triton.requirements import why_not_float_activations
from pymllm.kernels.triton.weight_only import WHOLE, Coding, coder
from pymllm.kernels.triton.weight_only_linear import WeightOnlyLinear, order_of
from pymllm.kernels.triton.words import Order, pack_words, span_of, unpack_words

if TYPE_CHECKING:
    import triton.language as tl


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
        packed = {
            "words": pack_words(weight.weight.view(torch.uint8), 8, order_of(problem)),
            "scales": weight.scales.t().contiguous(),
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
    return Coding(e4m3, 8, Order(int(span), int(beside)), int(group), int(rows))


@inline
def e4m3(words, n: tl.constexpr):
    """Decode code n: sign, exponent and fraction move to their places in a float32; 2^120 evens the exponents' bias."""
    top = words << (24 - 8 * n)
    bits = (top & -2147483648) | ((top >> 4) & 0x07F00000)
    value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where((top & 0x7F000000) == 0x7F000000, float("nan"), value)
