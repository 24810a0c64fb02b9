"""All routed experts of a layer in one call, over integer weights on the CPU: `kernels/integer_experts.h` says how.

Weights are packed as the linear kernels pack them. Tokens are sorted by expert and quantised once, the row blocks of
all experts are one parallel loop, and the values between the two products stay float32.
"""

# T tokens, K experts a token, E experts, H hidden size, I intermediate size

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pymllm.errors import ConfigError, counted
from pymllm.kernels.experts import ExpertsBias, ExpertsProblem
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.linear_experts import LinearExperts
from pymllm.kernels.native.addresses import CODE, address, contiguous, floats, integers, unfit
from pymllm.kernels.native.extension import isa_code, native
from pymllm.kernels.native.float_linear import wrong_input
from pymllm.kernels.native.integer import (
    DTYPES,
    EXACT_SLICES,
    NativeIntegerLinear,
    blocks_address,
    blocks_of,
    factors_address,
)
from pymllm.kernels.registry import Packed

GATES = {"silu": 0, "gelu_tanh": 1, "swiglu": 2}  # Gate::Kind in kernels/elementwise.h
ALL_TOKENS = 1 << 62  # as the number of tokens that are multiplied float-exactly


class NativeIntegerExperts(LinearExperts):
    """The kernel for experts whose products all go to kernels of packed integers: `native_int4`, `native_fp4`, ..."""

    name = "native_experts"
    device_type = "cpu"

    def why_not(self, problem: ExpertsProblem) -> str | None:
        products = problem.products()
        if problem.activation.kind not in GATES:
            return f"has {', '.join(GATES)} between the products, these have {problem.activation}"
        for product, linear in products.items():
            kernel = self.linear_kernel(linear)
            if not isinstance(kernel, NativeIntegerLinear):
                return f"takes products of native integer kernels, {product} goes to {kernel.name}"
            if linear.compute == "checkpoint" and linear.weight.activations != "float":  # type: ignore[union-attr]
                return "rounds its inputs in its own way, which compute=checkpoint forbids"
            if blocks_of(linear).in_features != linear.in_features:
                return f"takes inputs in whole blocks, {product} has {counted(linear.in_features, 'input')}"
        if "gate_up" not in products:
            return "takes gate and up as one weight, the layer has two"
        if problem.reordered:
            return "takes inputs in order, the weights have an order of their own"
        return None

    def numerics(self, problem: ExpertsProblem) -> str:
        kernels = {linear: self.linear_kernel(linear) for linear in problem.products().values()}
        said = dict.fromkeys(kernel.numerics(linear) for linear, kernel in kernels.items())
        return f"routed experts in one call, float32 between products; {'; '.join(said)}"

    def run(
        self,
        packed: Packed,
        problem: ExpertsProblem,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        bias: ExpertsBias,
    ) -> Tensor:
        dtype, gate_up, down = problem.dtype, problem.gate_up[0], problem.down
        if x.dtype is not dtype or not x.is_cpu or x.ndim != 2 or x.shape[1] != gate_up.in_features:
            raise wrong_input(x, gate_up, tokens="T")
        if topk_ids.ndim != 2:
            raise unfit("topk_ids", topk_ids, (x.shape[0], "K"))
        tokens, top_k = topk_ids.shape
        if tokens != x.shape[0] or topk_weights.shape != topk_ids.shape:
            raise ConfigError(
                f"{x.shape[0]} tokens have ids {tuple(topk_ids.shape)} and weights {tuple(topk_weights.shape)}, "
                f"both must be [{x.shape[0]}, K]",
                code=CODE,
            )
        x, ids, weights = (
            contiguous("x", x),
            integers("topk_ids", topk_ids),
            floats("topk_weights", topk_weights),
        )
        # Both products' biases need one dtype: their own if they agree, else float32.
        kinds = {b.dtype for b in bias if b is not None} or {torch.float32}
        bias_dtype = kinds.pop() if len(kinds) == 1 else torch.float32
        first, second = (None if b is None else floats("the bias", b, bias_dtype) for b in bias)
        y = torch.empty_like(x)
        exact = self.linear_kernel(down).exact_tokens[dtype] if problem.compute == "auto" else ALL_TOKENS
        native().integer_experts(
            _product(packed, "gate_up", gate_up, problem.num_experts, first),
            _product(packed, "down", down, problem.num_experts, second),
            problem.num_experts,
            GATES[problem.activation.kind],
            problem.activation.alpha,
            problem.activation.limit,
            DTYPES[bias_dtype],
            address("x", x, tokens * gate_up.in_features * dtype.itemsize),
            address("topk_ids", ids, tokens * top_k * ids.itemsize),
            address("topk_weights", weights, tokens * top_k * weights.itemsize),
            y.data_ptr(),
            tokens,
            top_k,
            DTYPES[dtype],
            exact,
            EXACT_SLICES[dtype],
            torch.get_num_threads(),
            isa_code(problem.device.isa),
        )
        return y


def _product(
    packed: Packed, name: str, linear: LinearProblem, experts: int, bias: Tensor | None
) -> tuple[Any, ...]:
    """Make the arguments that the binding takes for one product."""
    plan, rows = blocks_of(linear), (experts, linear.out_features)
    if bias is not None and bias.shape != rows:
        raise unfit(f"the bias of {name}", bias, rows)
    return (
        blocks_address(packed[f"{name}.blocks"], (experts, *plan.shape), experts * plan.size),
        linear.out_features,
        *plan.arguments,
        factors_address(packed.get(f"{name}.row_factors"), rows),
        0 if bias is None else address(f"the bias of {name}", bias, bias.nbytes),
    )
