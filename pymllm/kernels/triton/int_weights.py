"""Integer weights with a scale for every group, activations left in 16-bit floats (W4A16, W8A16).

Scales stay as stored. In memory they lie output beside output, so that a block of outputs reads them side by side. A
16-bit scale and a zero point are one int32: one load, of the four bytes that a GPU can fetch ahead.
"""

# O out_features, I in_features, G group_size

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from pymllm.kernels.canonical import CanonicalWeight, IntType, IntWeight
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.registry import Packed
from pymllm.kernels.triton.launch import inline
from pymllm.kernels.triton.linear_cases import EVEN, ODD
from pymllm.kernels.triton.pair_assembly import ONE, Assembly, decode_pairs, multiply_bfloat16, shift
from pymllm.kernels.triton.requirements import why_not_float_activations
from pymllm.kernels.triton.weight_only import WHOLE, Coding, Operands, coder
from pymllm.kernels.triton.weight_only_linear import WeightOnlyLinear, order_of
from pymllm.kernels.triton.words import Order, pack_words, span_of, unpack_words

if TYPE_CHECKING:
    import triton.language as tl


# The packed tensor that holds both scales of this type and zero points.
JOINED = {
    torch.float16: "float16_scales_and_zeros",
    torch.bfloat16: "bfloat16_scales_and_zeros",
}


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
        packed = {"words": pack_words(weight.codes, weight.bits, order_of(problem))}
        scales = weight.scales.t().contiguous()
        zeros = None if weight.zeros is None else weight.zeros.t().contiguous()
        joined = JOINED.get(weight.scales.dtype)
        if zeros is None:
            packed["scales"] = scales
        elif joined is None:
            packed |= {"scales": scales, "zeros": zeros}
        else:
            packed[joined] = (scales.view(torch.int16).int() & 0xFFFF) | (zeros.int() << 16)
        if weight.input_scales is not None:
            packed["input_scales"] = weight.input_scales
        return packed

    def unpack(self, packed: Packed, problem: LinearProblem) -> CanonicalWeight:
        kind = problem.weight
        assert isinstance(kind, IntType)
        scales, zeros = packed.get("scales"), packed.get("zeros")
        for dtype, name in JOINED.items():
            if name in packed:
                scales = packed[name].to(torch.int16).view(dtype)
                zeros = (packed[name] >> 16).to(torch.uint8)
        assert scales is not None
        return IntWeight(
            unpack_words(packed["words"], kind.bits, order_of(problem)),
            scales.t().clone(memory_format=torch.contiguous_format),
            None if zeros is None else zeros.t().contiguous(),
            kind.bits,
            kind.group_size,
            activations=kind.activations,
            input_scales=packed.get("input_scales"),
        )

    def operands(self, packed: Packed) -> Operands:
        scales = next((packed[name] for name in ("scales", *JOINED.values()) if name in packed), None)
        return Operands(packed["words"], scales, packed.get("zeros"))

    def coding(self, packed: Packed, problem: LinearProblem) -> str:
        kind = problem.weight
        assert isinstance(kind, IntType)
        whole = kind.group_size >= problem.in_features
        order = order_of(problem)
        joined = next((str(dtype)[6:] for dtype, name in JOINED.items() if name in packed), "")
        return f"int {kind.bits} {order.span} {order.beside} {WHOLE if whole else kind.group_size} {joined}".strip()

    def examples(self) -> Sequence[CanonicalWeight]:
        kinds = ((4, 32, False), (4, 128, False), (4, 128, True), (8, 128, False), (8, 14336, True))
        weights = [meta_int_weight(*EVEN, bits, group, symmetric) for bits, group, symmetric in kinds]
        return [*weights, meta_int_weight(*ODD, 4, 32, False)]


def meta_int_weight(out_features: int, in_features: int, bits: int, group: int, symmetric: bool) -> IntWeight:
    codes = torch.empty((out_features, in_features), dtype=torch.uint8, device="meta")
    scales = torch.empty((out_features, in_features // group), dtype=torch.float16, device="meta")
    return IntWeight(codes, scales, None if symmetric else scales.to(torch.uint8), bits, group)


@coder("int")
def int_coding(bits: str, span: str, beside: str, group: str, joined: str = "") -> Coding:
    """Make the coding.  joined: the dtype of scales that lie beside zero points, or ""."""
    order, kind = Order(int(span), int(beside)), f"{joined} and zero" if joined else "float"
    if bits == "4":
        return Coding(
            *(four_bits, 4, order, int(group)),
            offset=16.0,
            zero=8.0,
            scale_kind=kind,
            assemblies=four_bit_assembly,
        )
    return Coding(
        *(eight_bits, 8, order, int(group)),
        offset=256.0,
        zero=128.0,
        scale_kind=kind,
        assemblies=eight_bit_assembly,
    )


@functools.cache
def four_bit_assembly(dtype: torch.dtype) -> Assembly:
    """Decode under the exponent of 128 in bfloat16, of 1024 in float16: there the last bit counts ones."""
    if dtype is torch.bfloat16:
        power, magic, add = 128.0, "0x43004300", multiply_bfloat16(ONE)
    else:
        power, magic, add = 1024.0, "0x64006400", "add.rn.f16x2 p, p, {add};"

    def pair(n: int) -> str:
        return f"{shift('p', 4 * n)} lop3.b32 p, p, 0x000F000F, {magic}, 0xEA; {add}"

    return decode_pairs(8, pair, bias=-power)


@functools.cache
def eight_bit_assembly(dtype: torch.dtype) -> Assembly:
    """Decode under the exponent of 1024 in float16.

    bfloat16 has no place for 8 bits under one exponent: 128 plus the low seven, less 128 or 256, as the top bit is one
    or zero, is the code less 128.
    """

    def pair(n: int) -> str:
        if dtype is torch.float16:
            return f"{shift('p', 8 * n)} lop3.b32 p, p, 0x00FF00FF, 0x64006400, 0xEA; add.rn.f16x2 p, p, {{add}};"
        # 0x6A: (p & 0x00800080) ^ 0xC380C380, the negative of 128 or 256.
        return (
            f"{shift('p', 8 * n)} lop3.b32 q, p, 0x00800080, 0xC380C380, 0x6A;"
            " lop3.b32 p, p, 0x007F007F, 0x43004300, 0xEA;"
            f" mov.b32 r, {ONE * 0x10001:#010x}; fma.rn.bf16x2 p, p, r, q; {multiply_bfloat16(ONE)}"
        )

    return decode_pairs(4, pair, bias=-1024.0 if dtype is torch.float16 else 128.0)


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
