"""Group-wise int4 linear on the CPU, in C++.  Codes of 2 and 3 bits are kept in 4."""

from __future__ import annotations

from typing import ClassVar

import torch

from pymllm.kernels.canonical import IntType
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.native.integer import SCALES, NativeIntegerLinear, device_reason, group_reason


def integer_reason(problem: LinearProblem) -> str | None:
    """Why a native kernel cannot take this weight of integers of the right size; None: it can."""
    kind = problem.weight
    assert isinstance(kind, IntType)
    if kind.indexed:
        return f"takes groups that lie in order, the weight is {kind}"
    if kind.scales not in SCALES:
        return f"takes scales in float16, bfloat16 or float32, the weight has {kind.scales}"
    if problem.compute == "checkpoint" and kind.activations != "float":
        if "product" in kind.activations:
            return f"rounds activations before it multiplies, the checkpoint wants {kind.activations}"
        if problem.dtype is not torch.float32:  # 3.6e-2 from the writer's logits instead of 3.1e-2, w8a8
            return f"keeps weights exact, which writers of quantised activations round to {problem.dtype}"
    return group_reason(kind, problem.in_features, problem.out_features) or device_reason(problem)


class NativeInt4(NativeIntegerLinear):
    """Zero points or float offsets; scales as the checkpoint has them."""

    name: ClassVar[str] = "native_int4"
    layout: ClassVar[str] = "native_integer 16-row blocks"

    def why_not(self, problem: LinearProblem) -> str | None:
        kind = problem.weight
        if not isinstance(kind, IntType) or kind.bits > 4:
            return f"multiplies integers of up to 4 bits only, the weight is {kind}"
        return integer_reason(problem)
