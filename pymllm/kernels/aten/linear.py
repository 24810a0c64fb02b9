"""torch's own matmul and row gather, for weights that are plain floats."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pymllm.kernels.canonical import CanonicalWeight, DenseType, DenseWeight
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.registry import Packed


class TorchLinear:
    """Products with plain floats by torch.nn.functional.linear."""

    name = "torch"
    layout = "dense"

    def why_not(self, problem: LinearProblem) -> str | None:
        if not isinstance(problem.weight, DenseType):
            return f"multiplies plain floats only, the weight is {problem.weight}"
        if problem.weight.dtype is not problem.dtype:
            return f"needs weights in the inputs' dtype, the weight is {problem.weight}"
        return None

    def numerics(self, problem: LinearProblem) -> str:
        return "torch's matmul, sums in float32"

    def pack(self, weight: CanonicalWeight, problem: LinearProblem) -> Packed:
        return weight.tensors()

    def unpack(self, packed: Packed, problem: LinearProblem) -> CanonicalWeight:
        return DenseWeight(packed["weight"])

    def run(self, packed: Packed, problem: LinearProblem, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, packed["weight"], bias)


class TorchEmbedding(TorchLinear):
    """Rows of a table of plain floats by torch.nn.functional.embedding.

    A table in another dtype stays as it is: only its gathered rows are converted.
    """

    def why_not(self, problem: LinearProblem) -> str | None:
        if not isinstance(problem.weight, DenseType):
            return f"gathers plain floats only, the table is {problem.weight}"
        return None

    def numerics(self, problem: LinearProblem) -> str:
        return "rows as stored"

    def run(self, packed: Packed, problem: LinearProblem, ids: Tensor) -> Tensor:  # type: ignore[override]
        return F.embedding(ids, packed["weight"]).to(problem.dtype)
