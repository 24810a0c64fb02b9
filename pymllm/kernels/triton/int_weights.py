"""Integer weights with a scale for every group, activations left in 16-bit floats (W4A16, W8A16).

Scales stay as stored; in memory they lie output beside output, so that a block of outputs reads them side by side.
"""

# T tokens, O out_features, I in_features, G group_size

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pymllm.kernels.canonical import CanonicalWeight, IntType, IntWeight
from pymllm.kernels.hardware import Device, probe_device
from pymllm.kernels.registry import LinearProblem, Packed
from pymllm.kernels.triton.ahead_of_time import Case
from pymllm.kernels.triton.launch import inline
from pymllm.kernels.triton.linear_cases import EVEN, ODD, linear_cases
from pymllm.kernels.triton.operators import operator
from pymllm.kernels.triton.requirements import why_not_float_activations
from pymllm.kernels.triton.weight_only import Coding, Operands, multiply
from pymllm.kernels.triton.words import pack_words, span_of, unpack_words

if TYPE_CHECKING:
    import triton.language as tl


class TritonInt:
    """4 or 8 bits, with zero points or without."""

    name = "triton_int"
    layout = "triton_int words"

    def why_not(self, problem: LinearProblem) -> str | None:
        kind = problem.weight
        if not isinstance(kind, IntType) or kind.bits not in (4, 8):
            return f"multiplies integers of 4 or 8 bits only, the weight is {kind}"
        if not kind.plain:
            return f"takes integer zero points in groups that lie in order, the weight is {kind}"
        if span_of(kind.group_size) is None:
            return f"takes groups of multiples of 16 inputs, the weight has {kind.group_size}"
        return why_not_float_activations(problem, kind.activations)

    def numerics(self, problem: LinearProblem) -> str:
        return "weights rounded to the activations' dtype from two rows on, float32 accumulation"

    def pack(self, weight: CanonicalWeight, problem: LinearProblem) -> Packed:
        assert isinstance(weight, IntWeight)
        span = span_of(weight.group_size)
        assert span is not None
        packed = {
            "words": pack_words(weight.codes, weight.bits, span),
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
        span = span_of(kind.group_size)
        assert span is not None
        zeros = packed.get("zeros")
        return IntWeight(
            unpack_words(packed["words"], kind.bits, span),
            packed["scales"].t().contiguous(),
            None if zeros is None else zeros.t().contiguous(),
            kind.bits,
            kind.group_size,
            activations=kind.activations,
            input_scales=packed.get("input_scales"),
        )

    def run(self, packed: Packed, problem: LinearProblem, x: Tensor, bias: Tensor | None) -> Tensor:
        kind = problem.weight
        assert isinstance(kind, IntType)
        return int_linear(
            x,
            packed["words"],
            packed["scales"],
            packed.get("zeros"),
            bias,
            kind.bits,
            kind.group_size,
            problem.device.spec,
        )

    def cases(self, device: Device) -> Iterator[Case]:
        """4 and 8 bits, with zero points and without, and every length of group that changes the code."""
        kinds = (
            (4, 32, False),
            (4, 128, False),
            (4, 128, True),
            (4, 14336, True),
            (8, 128, False),
            (8, 14336, True),
        )
        weights = [_meta_weight(*EVEN, bits, group, symmetric) for bits, group, symmetric in kinds]
        return linear_cases(self, device, [*weights, _meta_weight(*ODD, 4, 32, False)])


def _meta_weight(out_features: int, in_features: int, bits: int, group: int, symmetric: bool) -> IntWeight:
    codes = torch.empty((out_features, in_features), dtype=torch.uint8, device="meta")
    scales = torch.empty((out_features, in_features // group), dtype=torch.float16, device="meta")
    return IntWeight(codes, scales, None if symmetric else scales.to(torch.uint8), bits, group)


@operator(
    "int_linear(Tensor x, Tensor words, Tensor scales, Tensor? zeros, Tensor? bias, int bits, int group_size, "
    "str device) -> Tensor",
    lambda x, words, *rest: x.new_empty((*x.shape[:-1], words.shape[0])),
)
def int_linear(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    device: str,
) -> Tensor:
    """x: [*, I].  words: [O, I·bits/32].  scales, zeros: [I/G, O].  Returns [*, O]."""
    return multiply(x, Operands(words, scales, zeros), bias, coding(bits, group_size), probe_device(device))


@functools.cache
def coding(bits: int, group_size: int) -> Coding:
    """How words of this kind become numbers."""
    span = span_of(group_size)
    assert span is not None
    decode, offset = (four_bits, 16.0) if bits == 4 else (eight_bits, 256.0)
    return Coding(decode, bits, span, group_size, offset=offset, zero=float(2 ** (bits - 1)))


# A code in the top bits of a float32's mantissa, under the exponent of 16 or 256, is that plus the code, exactly, in
# two instructions; the conversion of integers to floats runs at a quarter of their rate.


@inline
def four_bits(words, n: tl.constexpr):
    if n < 5:
        code = words << (19 - 4 * n)
    else:
        code = words >> (4 * n - 19)
    return ((code & 0x00780000) | 0x41800000).to(tl.float32, bitcast=True)


@inline
def eight_bits(words, n: tl.constexpr):
    if n < 2:
        code = words << (15 - 8 * n)
    else:
        code = words >> (8 * n - 15)
    return ((code & 0x007F8000) | 0x43800000).to(tl.float32, bitcast=True)
