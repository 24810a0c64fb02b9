"""The contract of linear and embedding kernels: their problem, and the interface of a kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pymllm.kernels.canonical import CanonicalWeight, WeightType
from pymllm.kernels.hardware import Device
from pymllm.kernels.registry import Compute, Kernel, Packed

# The relative error (Frobenius) that an exact kernel may have: the weight and the result are rounded to the dtype of
# activations (2^-9 or 2^-12 each), sums to float32 (about sqrt(I) units of 2^-24).
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


@dataclass(frozen=True)
class LinearProblem:
    """One rank's linear layer (or embedding table), as a kernel sees it.

    compute: "auto" lets a kernel round activations to fewer bits where that is faster; "exact" forbids it;
    "checkpoint" demands just what the checkpoint asks for.
    """

    weight: WeightType
    in_features: int
    out_features: int
    dtype: torch.dtype
    device: Device
    compute: Compute = "auto"


class LinearKernel(Kernel, Protocol):
    """A kernel for `x @ weight.T + bias` over packed weights.

    layout: the name of what `pack` makes: kernels with equal names make equal bytes.
    """

    layout: str

    def numerics(self, problem: LinearProblem) -> str:
        """Say how results differ from exact arithmetic over the stored weights, for a plan to show.

        A kernel whose error exceeds what the activations' dtype explains also has `tolerance(problem) -> float`, the
        relative error that it admits.
        """

    def pack(self, weight: CanonicalWeight, problem: LinearProblem) -> Packed:
        """Bring a weight into this kernel's own order.  Also runs on meta tensors: a plan counts the bytes."""

    def unpack(self, packed: Packed, problem: LinearProblem) -> CanonicalWeight:
        """Return what `pack` was given, bit for bit."""

    def run(self, packed: Packed, problem: LinearProblem, x: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply: x [*, I], in the problem's dtype -> [*, O]."""


class EmbeddingKernel(Kernel, Protocol):
    """A kernel for rows of a packed table; `pack` and `layout` as for a linear layer, so that a tied head shares it."""

    layout: str

    def numerics(self, problem: LinearProblem) -> str: ...

    def pack(self, weight: CanonicalWeight, problem: LinearProblem) -> Packed: ...

    def unpack(self, packed: Packed, problem: LinearProblem) -> CanonicalWeight: ...

    def run(self, packed: Packed, problem: LinearProblem, ids: Tensor) -> Tensor:
        """Look rows up.  ids: any shape, within the table.  Returns [*ids.shape, I] in the problem's dtype."""
