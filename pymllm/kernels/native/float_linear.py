"""Linear layers over bf16 and f16 weights on the CPU, in C++: `kernels/float_linear.h` says how.

The weight is the checkpoint's own tensor, read once a call and widened in registers; the arithmetic is float32, so
activations may have any float dtype. A token's result depends neither on the tokens beside it nor on the number of
threads, except where many tokens are left to torch (`TORCH_TOKENS`, and said in `numerics`).
"""

# T tokens, O out_features, I in_features

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pymllm.errors import ConfigError
from pymllm.kernels.canonical import CanonicalWeight, DenseType, DenseWeight
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.native.addresses import address, check_memory, contiguous, fits, unfit
from pymllm.kernels.native.extension import isa_code, native, native_missing_reason, probe
from pymllm.kernels.registry import Packed

FLOAT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # FloatType in kernels/float_linear.h
# WeightType there; a byte holds two codes of a codebook.
WEIGHT_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float8_e4m3fn: 2, torch.uint8: 3}
FAST_PATHS = (
    "avx512_vnni",
    "avx2_vnni",
    "avx2",
)  # paths that were measured to beat torch over the same weight
# More tokens than these are left to torch where the CPU has AVX512_BF16: torch then multiplies pairs of bf16 and wins
# once arithmetic is the limit. 16 tokens take it 2.6 ms at 4096 x 4096, and float32 arithmetic 3.4 ms
# (benchmarks/cpu_float_linear.py).
TORCH_TOKENS = 8


@functools.cache
def _torch_multiplies_bf16() -> bool:
    return "avx512_bf16" in probe().features


def _may_leave_to_torch(problem: LinearProblem) -> bool:
    return (
        problem.dtype is torch.bfloat16
        and problem.weight.dtype is torch.bfloat16  # type: ignore[union-attr]
        and problem.device.isa == FAST_PATHS[0]
        and _torch_multiplies_bf16()
    )


def run_native(
    problem: LinearProblem,
    x: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    scales: int = 0,
    block: tuple[int, int] = (0, 0),
    row_nan: int = 0,
    table: int = 0,
) -> Tensor:
    """Check the tensors, and call the extension's `float_linear`.

    block: outputs and inputs that share a scale.  scales, row_nan, table: addresses, for fp8 weights and codebooks.
    """
    # Every line costs: benchmarks/cpu_dispatch.py.
    dtype, out_features, in_features = problem.dtype, problem.out_features, problem.in_features
    shape, columns = x.shape, in_features // 2 if table else in_features
    if x.dtype is not dtype or not x.is_cpu or not shape or shape[-1] != in_features or x.is_neg():
        raise wrong_input(x, problem)
    kind = WEIGHT_TYPES.get(weight.dtype)
    whole = weight.shape == (out_features, columns) and weight.is_contiguous()
    if kind is None or not whole or not weight.is_cpu:
        raise unfit("the weight", weight, (out_features, columns))
    if not x.is_contiguous():
        x = contiguous("x", x)
    tokens = x.numel() // in_features if in_features else math.prod(shape[:-1])
    if bias is not None:
        bias = bias_of(bias, problem)
    y = x.new_empty(*shape[:-1], out_features)  # a tuple would cost 0.3 us
    native().float_linear(
        address("x", x, tokens * in_features * dtype.itemsize),
        FLOAT_TYPES[dtype],
        address("the weight", weight, out_features * columns * (2 if kind < 2 else 1)),
        kind,
        scales,
        block[0],
        block[1],
        row_nan,
        table,
        0 if bias is None else address("the bias", bias, out_features * dtype.itemsize),
        y.data_ptr(),
        tokens,
        out_features,
        in_features,
        isa_code(problem.device.isa),
        torch.get_num_threads(),
    )
    return y


def wrong_input(x: Tensor, problem: LinearProblem, tokens: str = "*") -> ConfigError:
    """Make the error for an x of another shape, dtype or device than the problem's."""
    return unfit("x", x, (tokens, problem.in_features), problem.dtype)


def bias_of(bias: Tensor, problem: LinearProblem) -> Tensor:
    """Bring a bias into the problem's dtype, contiguous.  ConfigError for another shape or device than the layer's."""
    if fits(bias, (problem.out_features,), problem.dtype) and not bias.is_neg():
        return bias
    right = bias.is_cpu and bias.layout is torch.strided and bias.is_floating_point()
    if bias.shape != (problem.out_features,) or not right:
        raise unfit("the bias", bias, (problem.out_features,))
    check_memory("the bias", bias)
    return bias.to(problem.dtype).resolve_neg().contiguous()


def why_not_here(problem: Any) -> str | None:
    """Return why no native kernel runs this problem: it is not on the CPU, or not in a dtype of `FLOAT_TYPES`.

    problem: of any operation.  None: one may.
    """
    if problem.device.type != "cpu":
        return "runs on the CPU only"
    if problem.dtype not in FLOAT_TYPES:
        return f"computes in float32, float16 or bfloat16, not in {problem.dtype}"
    return None


def why_not_floats(problem: LinearProblem, wanted: str) -> str | None:
    """Return why activations cannot be multiplied as the floats that they are; None: they can.

    wanted: the kind of activations that the checkpoint asks for.
    """
    here = why_not_here(problem)
    if here is None and problem.compute == "checkpoint" and wanted != "float":
        return f"keeps its inputs as floats, compute=checkpoint wants them quantised ({wanted})"
    return here


class NativeFloatLinear:
    """The kernel for bf16 or f16 weights × activations of any float dtype, in float32."""

    name = "native_bf16"
    device_type = "cpu"
    layout = "dense"  # the tensor as it is: an embedding may share it

    def why_not(self, problem: LinearProblem) -> str | None:
        kind = problem.weight
        if not isinstance(kind, DenseType) or kind.dtype not in (torch.bfloat16, torch.float16):
            return f"streams bfloat16 or float16 weights, the weight is {kind}"
        here = why_not_here(problem) or native_missing_reason()
        if here is not None:
            return here
        isa = problem.device.isa
        if kind.dtype is problem.dtype and isa is not None and isa not in FAST_PATHS:
            return f"is not known to be faster than torch on the path {isa}"
        return None

    def numerics(self, problem: LinearProblem) -> str:
        if _may_leave_to_torch(problem):
            return (
                f"float32 arithmetic for up to {TORCH_TOKENS} tokens, above that torch's bf16 matmul "
                "(products exact, sums in float32)"
            )
        return "weights widened exactly, float32 arithmetic"

    def pack(self, weight: CanonicalWeight, problem: LinearProblem) -> Packed:
        assert isinstance(weight, DenseWeight)
        return {"weight": weight.weight.contiguous()}

    def unpack(self, packed: Packed, problem: LinearProblem) -> CanonicalWeight:
        return DenseWeight(packed["weight"])

    def run(self, packed: Packed, problem: LinearProblem, x: Tensor, bias: Tensor | None) -> Tensor:
        weight = packed["weight"]
        if x.numel() > TORCH_TOKENS * problem.in_features and _may_leave_to_torch(problem):
            if x.dtype is not problem.dtype or not x.is_cpu or x.shape[-1] != problem.in_features:
                raise wrong_input(x, problem)
            for name, tensor in (("x", x), ("the weight", weight), ("the bias", bias)):
                if tensor is not None:
                    check_memory(name, tensor)
            return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
        return run_native(problem, x, bias, weight)
