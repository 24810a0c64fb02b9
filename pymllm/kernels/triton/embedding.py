"""Rows of a quantised table, gathered and expanded in one kernel.

The table is packed as linear kernels pack a weight, so that a tied head shares it.
"""

# V rows of the table, H hidden size, N ids, W words a row

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pymllm.kernels.hardware import Device
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.registry import Packed
from pymllm.kernels.triton.ahead_of_time import Case
from pymllm.kernels.triton.codebook_weights import TritonIntegerCodebook
from pymllm.kernels.triton.fp8_weights import TritonFp8
from pymllm.kernels.triton.int_weights import TritonInt
from pymllm.kernels.triton.launch import kernel
from pymllm.kernels.triton.operators import operator
from pymllm.kernels.triton.tuning import divide, next_power
from pymllm.kernels.triton.weight_only import Operands, coding_of
from pymllm.kernels.triton.weight_only_kernels import inputs_of_piece, load_scale_and_zero, whole_steps
from pymllm.kernels.triton.weight_only_linear import WeightOnlyLinear

if TYPE_CHECKING:
    import triton.language as tl


class _Gather(WeightOnlyLinear):
    def numerics(self, problem: LinearProblem) -> str:
        return "rows dequantised exactly"

    def run(self, packed: Packed, problem: LinearProblem, ids: Tensor) -> Tensor:  # type: ignore[override]
        weight = self.operands(packed)
        like = torch.empty(0, dtype=problem.dtype, device=ids.device)
        return gather(
            ids,
            weight.words,
            weight.scales,
            weight.zeros,
            weight.row_scales,
            like,
            self.coding(packed, problem),
        )

    def cases(self, device: Device) -> Iterator[Case]:
        weight = self.examples()[0]
        out_features, in_features = weight.shape
        problem = LinearProblem(weight.type, in_features, out_features, torch.bfloat16, device)
        if self.why_not(problem) is None:
            packed, ids = self.pack(weight, problem), torch.empty(64, dtype=torch.int64, device="meta")
            yield Case(f"64 rows of {weight.type}", lambda: self.run(packed, problem, ids))


class TritonIntEmbedding(_Gather, TritonInt):
    """A table of integers."""


class TritonFp8Embedding(_Gather, TritonFp8):
    """A table of fp8."""

    def operands(self, packed: Packed) -> Operands:
        """Leave out what makes products of whole rows NaN: single numbers are."""
        return Operands(packed["words"], packed["scales"])


class TritonIntegerCodebookEmbedding(_Gather, TritonIntegerCodebook):
    """A table of codes of a codebook of integers."""


@operator(
    "gather_rows(Tensor ids, Tensor words, Tensor? scales, Tensor? zeros, Tensor? row_scales, Tensor like, str coding)"
    " -> Tensor",
    lambda ids, words, scales, zeros, row_scales, like, coding: like.new_empty(
        (*ids.shape, words.shape[1] * coding_of(coding).per_word)
    ),
)
def gather(
    ids: Tensor,
    words: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    row_scales: Tensor | None,
    like: Tensor,
    coding: str,
) -> Tensor:
    """Gather rows of a table, and expand them.

    ids: any shape, int64.  words: [V, W].  like: a tensor of the result's dtype.  Returns [*ids.shape, H].
    """
    how = coding_of(coding)
    rows, row_words = words.shape
    y = like.new_empty((*ids.shape, row_words * how.per_word))
    if ids.numel():
        spans = row_words * how.per_word // how.order.span
        block = min(next_power(spans), 16)
        gather_rows.launch(
            (ids.numel(), divide(spans, block)),
            ids.contiguous(),
            words,
            scales,
            zeros,
            row_scales,
            y,
            rows,
            row_words,
            BLOCK_S=block,
            num_warps=4,
            **how.constants,
        )
    return y


@kernel(varying=("ids",))
def gather_rows(
    ids,
    words,
    scales,
    zeros,
    row_scales,
    y,
    out_features,
    row_words,
    BLOCK_S: tl.constexpr,
    DECODE: tl.constexpr,
    N: tl.constexpr,
    SPAN: tl.constexpr,
    PIECE: tl.constexpr,
    BESIDE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    OFFSET: tl.constexpr,
    ZERO: tl.constexpr,
    SCALE_KIND: tl.constexpr,
):
    """Gather some spans of a row, and expand them.

    ids: [N].  words: [V, W].  y: [N, H].  Grid: (N, spans of a row / BLOCK_S).
    """
    SPAN_WORDS: tl.constexpr = SPAN // N
    row_words = whole_steps(row_words, SPAN_WORDS)
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(ids + place)
    first = (tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)) * SPAN_WORDS  # word of each span
    mask = first < row_words
    columns = first[:, None] + tl.arange(0, SPAN_WORDS)[None, :]
    tile = tl.load(words + row * row_words + columns, mask=mask[:, None], other=0)
    for piece in tl.static_range(SPAN // PIECE):
        start = first * N + piece * PIECE
        scale, zero = load_scale_and_zero(
            scales, zeros, start // GROUP, row, mask, out_features, GROUP_ROWS, ZERO, SCALE_KIND
        )
        if row_scales is not None:
            scale *= tl.load(row_scales + row)
        value = inputs_of_piece(
            tile, zero, piece, tl.float32, DECODE, N, SPAN, PIECE, BESIDE, OFFSET, "", 0.0, 0, True
        )
        inputs = start[:, None] + tl.arange(0, PIECE)[None, :]
        tl.store(
            y + place * (row_words * N) + inputs,
            (value * scale[:, None]).to(y.dtype.element_ty),
            mask=mask[:, None],
        )
