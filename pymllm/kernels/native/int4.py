"""Linear layers over int4 weights in groups on the CPU, in C++.  Codes of 2 and 3 bits are kept in 4."""

from __future__ import annotations

from typing import ClassVar

from pymllm.kernels.canonical import IntType
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.native.integer import NativeIntegerLinear, integer_reason


class NativeInt4(NativeIntegerLinear):
    """The kernel for codes of up to 4 bits; zero points or float offsets; scales as the checkpoint has them."""

    name: ClassVar[str] = "native_int4"

    def why_not(self, problem: LinearProblem) -> str | None:
        kind = problem.weight
        if not isinstance(kind, IntType) or kind.bits > 4:
            return f"multiplies integers of up to 4 bits only, the weight is {kind}"
        return integer_reason(problem)
