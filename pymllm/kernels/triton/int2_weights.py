"""2-bit integer weights with a scale for every group, activations left in 16-bit floats (W2A16)."""

# O out_features, I in_features

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pymllm.kernels.canonical import CanonicalWeight, IntType
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.registry import Packed
from pymllm.kernels.triton.int_weights import TritonInt, meta_int_weight
from pymllm.kernels.triton.launch import inline
from pymllm.kernels.triton.linear_cases import EVEN, ODD
from pymllm.kernels.triton.weight_only import Coding, coder
from pymllm.kernels.triton.words import Order

if TYPE_CHECKING:
    import triton.language as tl


class TritonInt2(TritonInt):
    """2-bit integers, sixteen in a word."""

    name = "triton_int2"
    layout = "triton_int2 words"
    bits = (2,)

    def coding(self, packed: Packed, problem: LinearProblem) -> str:
        kind = problem.weight
        assert isinstance(kind, IntType)
        return "int2" + super().coding(packed, problem).removeprefix("int 2")

    def examples(self) -> Sequence[CanonicalWeight]:
        return [meta_int_weight(*EVEN, 2, 64, False), meta_int_weight(*ODD, 2, 64, True)]


@coder("int2")
def int2_coding(span: str, beside: str, group: str, joined: str = "") -> Coding:
    """Make the coding.  joined: as for `int_coding`."""
    kind = f"{joined} and zero" if joined else "float"
    order = Order(int(span), int(beside))
    return Coding(two_bits, 2, order, int(group), offset=4.0, zero=2.0, scale_kind=kind)


@inline
def two_bits(words, n: tl.constexpr):
    """Decode code n of each word, plus 4, as `int_weights.four_bits` does: under the exponent of 4."""
    if n < 11:
        code = words << (21 - 2 * n)
    else:
        code = words >> (2 * n - 21)
    return ((code & 0x00600000) | 0x40800000).to(tl.float32, bitcast=True)
