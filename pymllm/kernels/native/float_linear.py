"""Linear layers over bf16 and f16 weights on the CPU, in C++: `kernels/float_linear.h` says how.

The weight is the checkpoint's own tensor, read once a call and widened in registers; the arithmetic is float32, so
activations may have any float dtype. A token's result does not depend on the tokens beside it, nor on the threads;
where many tokens are left to torch (below, and in `numerics`), torch decides.
"""

# T tokens, O out_features, I in_features

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from pymllm.kernels.canonical import CanonicalWeight, DenseType, DenseWeight
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.native.extension import isa_code, native, native_missing_reason, probe
from pymllm.kernels.registry import Packed

FLOAT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # FloatType in kernels/float_linear.h
# WeightType there; bytes are codes of a codebook, two in each
WEIGHT_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float8_e4m3fn: 2, torch.uint8: 3}
FAST_PATHS = ("avx512_vnni", "avx2_vnni", "avx2")  # measured to be faster than torch over the same weight
# With AVX512_BF16 torch multiplies pairs of bf16 and wins once arithmetic is the limit: 16 tokens take it 2.6 ms at
# 4096 x 4096, and float32 arithmetic 3.4 (benchmarks/cpu_float_linear.py).
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
    """Check, and call `float_linear`.  scales, row_nan, table: addresses, for fp8 weights and codebooks."""
    # Every line costs: benchmarks/cpu_dispatch.py.
    dtype, out_features, in_features, shape = (
        problem.dtype,
        problem.out_features,
        problem.in_features,
        x.shape,
    )
    if x.dtype is not dtype or not x.is_cpu or shape[-1] != in_features:
        raise ValueError(
            f"x must be [*, {in_features}] {dtype} on the CPU, not {tuple(shape)} {x.dtype} on {x.device}"
        )
    if (
        weight.shape != (out_features, in_features // 2 if table else in_features)
        or not weight.is_contiguous()
        or not weight.is_cpu
    ):
        raise ValueError(f"the weight must be [{out_features}, {in_features}], contiguous and on the CPU")
    bias_address = 0
    if bias is not None:
        bias = bias.to(dtype).contiguous()
        if bias.shape != (out_features,) or not bias.is_cpu:
            raise ValueError(
                f"the bias must be [{out_features}] on the CPU, not {tuple(bias.shape)} on {bias.device}"
            )
        bias_address = bias.data_ptr()
    x = x.contiguous()
    y = x.new_empty((*shape[:-1], out_features))
    native().float_linear(
        x.data_ptr(),
        FLOAT_TYPES[dtype],
        weight.data_ptr(),
        WEIGHT_TYPES[weight.dtype],
        scales,
        block[0],
        block[1],
        row_nan,
        table,
        bias_address,
        y.data_ptr(),
        y.numel() // out_features if out_features else 0,
        out_features,
        in_features,
        isa_code(problem.device.isa),
        torch.get_num_threads(),
    )
    return y


def why_not_floats(problem: LinearProblem, wanted: str) -> str | None:
    """What keeps activations from being multiplied as they are.  wanted: how the checkpoint has them quantised."""
    if problem.device.type != "cpu":
        return "runs on the CPU only"
    if problem.dtype not in FLOAT_TYPES:
        return f"computes over float32, float16 or bfloat16 activations, not {problem.dtype}"
    if problem.compute == "checkpoint" and wanted != "float":
        return f"keeps activations as floats, compute=checkpoint wants them quantised ({wanted})"
    return None


class NativeFloatLinear:
    """bf16 or f16 weights × activations of any float dtype, in float32."""

    name = "native_bf16"
    device_type = "cpu"  # the only one it runs on
    layout = "dense"  # the tensor as it is: an embedding may share it

    def why_not(self, problem: LinearProblem) -> str | None:
        kind = problem.weight
        if not isinstance(kind, DenseType) or kind.dtype not in (torch.bfloat16, torch.float16):
            return f"streams bfloat16 or float16 weights, the weight is {kind}"
        if problem.device.type != "cpu":
            return "runs on the CPU only"
        if problem.dtype not in FLOAT_TYPES:
            return f"computes over float32, float16 or bfloat16 activations, not {problem.dtype}"
        missing = native_missing_reason()
        if missing is not None:
            return missing
        isa = problem.device.isa
        if kind.dtype is problem.dtype and isa is not None and isa not in FAST_PATHS:
            return f"is not known to be faster than torch on the path {isa}"
        return None

    def numerics(self, problem: LinearProblem) -> str:
        if _may_leave_to_torch(problem):
            return (
                f"float32 arithmetic for up to {TORCH_TOKENS} tokens, above that torch's bf16 matmul "
                "(products exact, float32 accumulation)"
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
            return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
        return run_native(problem, x, bias, weight)
