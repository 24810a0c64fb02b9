"""Integer weights with a scale for every group, activations left in 16-bit floats (W4A16, W8A16).

Scales stay as stored. In memory they lie output beside output, so that a block of outputs reads them side by side.
"""

# O out_features, I in_features, G group_size

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from pymllm.kernels.canonical import CanonicalWeight, IntType, IntWeight
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.registry import Packed
from pymllm.kernels.triton.launch import inline
from pymllm.kernels.triton.linear_cases import EVEN, ODD
from pymllm.kernels.triton.requirements import why_not_float_activations
from pymllm.kernels.triton.weight_only import WHOLE, Coding, coder
from pymllm.kernels.triton.weight_only_linear import WeightOnlyLinear
from pymllm.kernels.triton.words import pack_words, span_of, unpack_words

if TYPE_CHECKING:
    import triton.language as tl


class TritonInt(WeightOnlyLinear):
    """Integers of 4 or 8 bits, with zero points or without."""

    name = "triton_int"
    layout = "triton_int words"
    bits: tuple[int, ...] = (4, 8)

    def why_not(self, problem: LinearProblem) -> str | None:
        kind = problem.weight
        if not isinstance(kind, IntType) or kind.bits not in self.bits:
            return (
                f"multiplies integers of {' or '.join(map(str, self.bits))} bits only, the weight is {kind}"
            )
        if not kind.plain:
            return f"takes integer zero points in groups that lie in order, the weight is {kind}"
        if span_of(kind.group_size) is None:
            return f"takes groups of multiples of 16 inputs, the weight has {kind.group_size}"
        return why_not_float_activations(problem, kind.activations)

    def pack(self, weight: CanonicalWeight, problem: LinearProblem) -> Packed:
        assert isinstance(weight, IntWeight)
        packed = {
            "words": pack_words(weight.codes, weight.bits, _span(weight.group_size)),
            "scales": weight.scales.t().contiguous(),
        }
        if weight.zeros is not None:
            packed["zeros"] = weight.zeros.t().contiguous()
        if weight.input_scales is not None:
            packed["input_scales"] = weight.input_scales
        return packed

    def unpack(self, packed: Packed, problem: LinearProblem) -> CanonicalWeight:
        kind = problem.weight
        assert isinstance(kind, IntType)
        zeros = packed.get("zeros")
        return IntWeight(
            unpack_words(packed["words"], kind.bits, _span(kind.group_size)),
            packed["scales"].t().contiguous(),
            None if zeros is None else zeros.t().contiguous(),
            kind.bits,
            kind.group_size,
            activations=kind.activations,
            input_scales=packed.get("input_scales"),
        )

    def coding(self, packed: Packed, problem: LinearProblem) -> str:
        kind = problem.weight
        assert isinstance(kind, IntType)
        whole = kind.group_size >= problem.in_features
        return f"int {kind.bits} {_span(kind.group_size)} {WHOLE if whole else kind.group_size}"

    def examples(self) -> Sequence[CanonicalWeight]:
        kinds = ((4, 32, False), (4, 128, False), (4, 128, True), (8, 128, False), (8, 14336, True))
        weights = [meta_int_weight(*EVEN, bits, group, symmetric) for bits, group, symmetric in kinds]
        return [*weights, meta_int_weight(*ODD, 4, 32, False)]


def meta_int_weight(out_features: int, in_features: int, bits: int, group: int, symmetric: bool) -> IntWeight:
    codes = torch.empty((out_features, in_features), dtype=torch.uint8, device="meta")
    scales = torch.empty((out_features, in_features // group), dtype=torch.float16, device="meta")
    return IntWeight(codes, scales, None if symmetric else scales.to(torch.uint8), bits, group)


def _span(group_size: int) -> int:
    span = span_of(group_size)
    assert span is not None
    return span


@coder("int")
def int_coding(bits: str, span: str, group: str) -> Coding:
    if bits == "4":
        return Coding(four_bits, 4, int(span), int(group), offset=16.0, zero=8.0)
    return Coding(eight_bits, 8, int(span), int(group), offset=256.0, zero=128.0)


# A float32 with the exponent of 16 or 256, and a code in the top bits of its mantissa, is exactly 16 or 256 plus the
# code. That takes two instructions; the conversion of integers to floats runs at a quarter of their rate.


@inline
def four_bits(words, n: tl.constexpr):
    """Decode code n of each word, plus 16."""
    if n < 5:
        code = words << (19 - 4 * n)
    else:
        code = words >> (4 * n - 19)
    return ((code & 0x00780000) | 0x41800000).to(tl.float32, bitcast=True)


@inline
def eight_bits(words, n: tl.constexpr):
    """Decode code n of each word, plus 256."""
    if n < 2:
        code = words << (15 - 8 * n)
    else:
        code = words >> (8 * n - 15)
    return ((code & 0x007F8000) | 0x43800000).to(tl.float32, bitcast=True)
