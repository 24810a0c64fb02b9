"""Codebooks of integers, activations left in 16-bit floats: GGUF's IQ types (`pymllm/kernels/codebooks.py`)."""

# O out_features, I in_features, G group_size

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from pymllm.kernels.canonical import CanonicalWeight, CodebookType, CodebookWeight
from pymllm.kernels.codebooks import INTEGER_CODEBOOKS
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.registry import Packed
from pymllm.kernels.triton.fp4_weights import SCALE_KINDS, TritonFp4
from pymllm.kernels.triton.launch import Inline, inline
from pymllm.kernels.triton.linear_cases import EVEN
from pymllm.kernels.triton.requirements import why_not_float_activations
from pymllm.kernels.triton.weight_only import Coding, coder
from pymllm.kernels.triton.weight_only_linear import order_of
from pymllm.kernels.triton.words import Order, span_of

if TYPE_CHECKING:
    import triton.language as tl


class TritonIntegerCodebook(TritonFp4):
    """Codes of a codebook as words, packed as those of fp4 are."""

    name = "triton_integer_codebook"

    def why_not(self, problem: LinearProblem) -> str | None:
        kind = problem.weight
        if not isinstance(kind, CodebookType) or kind.codebook not in DECODERS:
            return f"multiplies codes of {' or '.join(DECODERS)} only, the weight is {kind}"
        if span_of(kind.group_size) is None or problem.in_features % kind.group_size:
            return f"needs whole groups of multiples of 16 inputs, the weight is {kind}"
        return why_not_float_activations(problem, kind.activations)

    def coding(self, packed: Packed, problem: LinearProblem) -> str:
        kind = problem.weight
        assert isinstance(kind, CodebookType)
        order, scales = order_of(problem), SCALE_KINDS.get(packed["scales"].dtype, "float")
        return f"codebook {kind.codebook} {order.span} {order.beside} {kind.group_size} {scales}"

    def examples(self) -> Sequence[CanonicalWeight]:
        out_features, in_features = EVEN
        return [
            CodebookWeight(
                torch.empty(EVEN, dtype=torch.uint8, device="meta"),
                torch.tensor(INTEGER_CODEBOOKS[name].values),
                torch.empty((out_features, in_features // group), device="meta"),
                name,
                group,
            )
            for name, group in (("iq4", 32), ("iq2", 16))
        ]


@inline
def integer_of(code, w0: tl.constexpr, w1: tl.constexpr, w2: tl.constexpr, w3: tl.constexpr):
    """Look code 0..15 up among 16 signed bytes: four words, the lowest byte first."""
    word = tl.where(code < 8, tl.where(code < 4, w0, w1), tl.where(code < 12, w2, w3))
    return ((word << (24 - 8 * (code & 3))) >> 24).to(tl.float32)


# The words are the codebooks' integers; test_float_weights.py checks every code.


@inline
def iq4(words, n: tl.constexpr):
    return integer_of(words >> (4 * n) & 15, -0x4052677F, -0x09152231, 0x26190D01, 0x71594535)


@inline
def iq3_xxs(words, n: tl.constexpr):
    return integer_of(words >> (4 * n) & 15, 0x1C140C04, 0x3E342C24, -0x1B130B04, -0x3D332B24)


@inline
def iq3_s(words, n: tl.constexpr):
    return integer_of(words >> (4 * n) & 15, 0x07050301, 0x0F0D0B09, -0x06040201, -0x0E0C0A09)


@inline
def iq2(words, n: tl.constexpr):
    return integer_of(words >> (4 * n) & 15, 0x002B1908, 0x00000000, 0x00D5E7F8, 0x00000000)


@inline
def iq1(words, n: tl.constexpr):
    return integer_of(words >> (4 * n) & 15, 0x000901F9, 0x00000000, 0x0007FFF7, 0x00000000) * 0.125


DECODERS: dict[str, Inline] = {"iq4": iq4, "iq3_xxs": iq3_xxs, "iq3_s": iq3_s, "iq2": iq2, "iq1": iq1}


@coder("codebook")
def codebook_coding(name: str, span: str, beside: str, group: str, scale_kind: str) -> Coding:
    order = Order(int(span), int(beside))
    return Coding(DECODERS[name], 4, order, int(group), scale_kind=scale_kind)
