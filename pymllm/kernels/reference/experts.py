"""The reference kernel for experts: always last, runs everything, correct rather than fast.

Weights stay packed as the linear reference packs them; an expert is dequantised, a few rows at a time, only where
tokens were routed to it. Products accumulate in float32.
"""

from __future__ import annotations

from pymllm.kernels.experts import ExpertsProblem
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.linear_experts import LinearExperts
from pymllm.kernels.reference.linear import ReferenceLinear


class ReferenceExperts(LinearExperts):
    """`LinearExperts` with the reference for every product."""

    name = "reference"
    layout = "reference, stacked over experts"

    def linear_kernel(self, problem: LinearProblem) -> ReferenceLinear:
        return ReferenceLinear()

    def why_not(self, problem: ExpertsProblem) -> str | None:
        return None
