"""Linear layers over int8 weights in groups on the CPU, in C++.

Activations are as the kernel chooses (`integer.py`), or int8 as a checkpoint demands them.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from pymllm.kernels.canonical import IntType
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.native.integer import NativeIntegerLinear, integer_reason


class NativeInt8(NativeIntegerLinear):
    """The kernel for codes of 5 to 8 bits; zero points or float offsets; scales as the checkpoint has them."""

    name: ClassVar[str] = "native_int8"
    # Twice the bytes of int4 take twice the time to read, which hides 9 rows of products (3 slices of 3 tokens in
    # float32, 2 slices of 4 in 16 bits; benchmarks/cpu_linear.py).
    exact_tokens: ClassVar[dict[torch.dtype, int]] = {torch.float32: 3, torch.float16: 4, torch.bfloat16: 4}

    def why_not(self, problem: LinearProblem) -> str | None:
        kind = problem.weight
        if not isinstance(kind, IntType) or kind.bits <= 4:
            return f"multiplies integers of 5 to 8 bits only, the weight is {kind}"
        return integer_reason(problem)
