"""e2m1 weights, activations left in 16-bit floats: MXFP4 (a power of two for 32 inputs), NVFP4 (two-level scales)."""

# O out_features, I in_features, G group_size

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pymllm.kernels.canonical import CanonicalWeight, CodebookType, CodebookWeight
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.registry import Packed
from pymllm.kernels.triton.launch import inline
from pymllm.kernels.triton.linear_cases import EVEN, ODD
from pymllm.kernels.triton.pair_assembly import Assembly, decode_pairs, multiply_bfloat16, shift, signed_pair
from pymllm.kernels.triton.requirements import why_not_float_activations
from pymllm.kernels.triton.weight_only import Coding, Operands, coder
from pymllm.kernels.triton.weight_only_linear import WeightOnlyLinear, order_of
from pymllm.kernels.triton.words import Order, pack_words, span_of, unpack_words

if TYPE_CHECKING:
    import triton.language as tl

SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SCALE_KINDS = {torch.float8_e8m0fnu: "e8m0", torch.float8_e4m3fn: "e4m3"}


TO_THE_126TH = (127 + 126) << 7  # 2^126 in bfloat16


class TritonFp4(WeightOnlyLinear):
    """e2m1 codes as words.  Scales keep their type, and are read as bytes where that is an 8-bit float."""

    name = "triton_fp4"
    layout = "triton_fp4 words"

    def why_not(self, problem: LinearProblem) -> str | None:
        kind = problem.weight
        if not isinstance(kind, CodebookType) or kind.codebook != "e2m1":
            return f"multiplies e2m1 floats only, the weight is {kind}"
        if span_of(kind.group_size) is None or problem.in_features % kind.group_size:
            return f"needs whole groups of multiples of 16 inputs, the weight is {kind}"
        return why_not_float_activations(problem, kind.activations)

    def pack(self, weight: CanonicalWeight, problem: LinearProblem) -> Packed:
        assert isinstance(weight, CodebookWeight)
        packed = weight.tensors()
        del packed["codes"]
        return {
            **packed,
            "words": pack_words(weight.codes, 4, order_of(problem)),
            "scales": _transposed(weight.scales),
        }

    def unpack(self, packed: Packed, problem: LinearProblem) -> CanonicalWeight:
        kind = problem.weight
        assert isinstance(kind, CodebookType)
        return CodebookWeight(
            unpack_words(packed["words"], 4, order_of(problem)),
            packed["table"],
            _transposed(packed["scales"]),
            kind.codebook,
            kind.group_size,
            packed.get("row_scales"),
            kind.activations,
            packed.get("input_scales"),
        )

    def operands(self, packed: Packed) -> Operands:
        scales = packed["scales"]
        raw = scales.view(torch.uint8) if scales.dtype in SCALE_KINDS else scales
        return Operands(packed["words"], raw, None, packed.get("row_scales"))

    def coding(self, packed: Packed, problem: LinearProblem) -> str:
        kind = problem.weight
        assert isinstance(kind, CodebookType)
        order, scales = order_of(problem), SCALE_KINDS.get(packed["scales"].dtype, "float")
        return f"fp4 {order.span} {order.beside} {kind.group_size} {scales}"

    def examples(self) -> Sequence[CanonicalWeight]:
        return [
            _meta_weight(*EVEN, torch.float8_e8m0fnu, 32),
            _meta_weight(*EVEN, torch.float8_e4m3fn, 16),
            _meta_weight(*ODD, torch.float8_e4m3fn, 16),
        ]


def _meta_weight(out_features: int, in_features: int, scales: torch.dtype, group: int) -> CodebookWeight:
    return CodebookWeight(
        torch.empty((out_features, in_features), dtype=torch.uint8, device="meta"),
        torch.tensor((*SIZES, *(-size for size in SIZES))),
        torch.empty((out_features, in_features // group), dtype=scales, device="meta"),
        "e2m1",
        group,
        torch.empty(out_features, device="meta") if group == 16 else None,
    )


def _transposed(scales: Tensor) -> Tensor:
    """Transpose scales.  8-bit floats go as bytes, as torch does not copy them on every device."""
    if scales.dtype.itemsize > 1:
        return scales.t().contiguous()
    return scales.view(torch.uint8).t().contiguous().view(scales.dtype)


@coder("fp4")
def fp4_coding(span: str, beside: str, group: str, scale_kind: str) -> Coding:
    order = Order(int(span), int(beside))
    return Coding(e2m1, 4, order, int(group), scale_kind=scale_kind, assemblies=e2m1_assembly)


@functools.cache
def e2m1_assembly(dtype: torch.dtype) -> Assembly:
    """Decode by moving the fields to those of the wider float; see `fp8_weights.e4m3_assembly`."""
    moved, mask = (6, "0x01C001C0") if dtype is torch.bfloat16 else (9, "0x0E000E00")
    even = multiply_bfloat16(TO_THE_126TH) if dtype is torch.bfloat16 else ""

    def pair(n: int) -> str:
        size = f"{shift('p', 4 * n - moved)} and.b32 p, p, {mask};"
        return f"{signed_pair(size, 4 * n + 3)} {even}"

    return decode_pairs(8, pair, bias=-0.0, factor=1.0 if even else 2.0**14)


@inline
def e2m1(words, n: tl.constexpr):
    """Decode code n: exponent and fraction move to their places in a float32; below 1 they count halves."""
    code = words >> (4 * n)
    size = code & 7
    normal = ((size << 22) + 0x3F000000).to(tl.float32, bitcast=True)
    value = tl.where(size > 1, normal, tl.where(size == 1, 0.5, 0.0))
    return tl.where((code & 8) != 0, -value, value)
