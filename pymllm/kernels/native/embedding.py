"""Embeddings over packed tables on the CPU, in C++: rows out of the very bytes that the linear kernels multiply.

A tied head therefore shares the table with its embedding. A row is what dequantising would give, bit for bit.
"""

# O rows of the table, I its width

from __future__ import annotations

import torch
from torch import Tensor

from pymllm.kernels.linear import TOLERANCES, LinearProblem
from pymllm.kernels.native.addresses import address, integers
from pymllm.kernels.native.extension import native
from pymllm.kernels.native.fp4 import NativeFp4
from pymllm.kernels.native.int4 import NativeInt4
from pymllm.kernels.native.int8 import NativeInt8
from pymllm.kernels.native.integer import (
    BLOCK_ROWS,
    DTYPES,
    NativeIntegerLinear,
    blocks_address,
    blocks_of,
    factors_address,
)
from pymllm.kernels.native.integer_codebook import NativeIntegerCodebook
from pymllm.kernels.registry import Packed


class NativeIntegerEmbedding(NativeIntegerLinear):
    """The base of the embeddings below: rows out of packed blocks."""

    def why_not(self, problem: LinearProblem) -> str | None:
        if problem.out_features < BLOCK_ROWS:
            return f"packs {BLOCK_ROWS} rows at a time, the table has {problem.out_features}"
        return super().why_not(problem)  # type: ignore[misc]

    def numerics(self, problem: LinearProblem) -> str:
        return "rows dequantised exactly"

    def tolerance(self, problem: LinearProblem) -> float:
        return TOLERANCES[problem.dtype]

    def run(self, packed: Packed, problem: LinearProblem, ids: Tensor) -> Tensor:  # type: ignore[override]
        plan = blocks_of(problem)
        ids = integers("ids", ids)
        rows = torch.empty((*ids.shape, problem.in_features), dtype=problem.dtype)
        native().integer_gather(
            blocks_address(packed["blocks"], plan.shape, plan.size),
            problem.out_features,
            *plan.arguments,
            factors_address(packed.get("row_factors"), (problem.out_features,)),
            problem.in_features,
            address("ids", ids, ids.numel() * ids.itemsize),
            ids.numel(),
            DTYPES[problem.dtype],
            rows.data_ptr(),
            torch.get_num_threads(),
        )
        return rows


class NativeInt4Embedding(NativeIntegerEmbedding, NativeInt4):
    """Rows of the tables that `NativeInt4` multiplies."""


class NativeInt8Embedding(NativeIntegerEmbedding, NativeInt8):
    """Rows of the tables that `NativeInt8` multiplies."""


class NativeFp4Embedding(NativeIntegerEmbedding, NativeFp4):
    """Rows of the tables that `NativeFp4` multiplies."""


class NativeIntegerCodebookEmbedding(NativeIntegerEmbedding, NativeIntegerCodebook):
    """Rows of the tables that `NativeIntegerCodebook` multiplies."""
