"""The gated delta rule, the scan of Mamba 2 and causal convolutions on the CPU in C++: `kernels/recurrence.h`.

Tokens are taken one after the other, in float32, in one order of sums: a request has the same bits however its prompt
is cut, whatever is beside it, and on any number of threads.
"""

# R requests, T tokens of this step

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pymllm.errors import IndicesError
from pymllm.kernels.attention import AttentionStep
from pymllm.kernels.native.addresses import address, checked_address, contiguous, floats, strided_rows, unfit
from pymllm.kernels.native.attention import step_numbers
from pymllm.kernels.native.extension import isa_code, native, native_missing_reason
from pymllm.kernels.native.float_linear import FLOAT_TYPES, why_not_here
from pymllm.kernels.recurrence import (
    CausalConvProblem,
    GatedDeltaProblem,
    Mamba2ScanProblem,
    check_causal_conv,
    check_gated_delta,
    check_mamba2_scan,
    check_state_form,
)


class _Native:
    """A kernel in native code.  isa: a kernel path, for tests; None: the one in use here."""

    name = "native"
    device_type = "cpu"
    reproducible = True

    def __init__(self, isa: str | None = None) -> None:
        self.isa = isa

    def why_not(self, problem: Any) -> str | None:
        return why_not_here(problem) or native_missing_reason()

    def _isa(self, problem: Any) -> int:
        return isa_code(self.isa or problem.device.isa)


class NativeGatedDelta(_Native):
    """The rule token by token, a head's state in blocks of columns that stay in the first-level cache."""

    def run(
        self,
        problem: GatedDeltaProblem,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        state: Tensor | None,
        step: AttentionStep,
    ) -> Tensor:
        tokens = check_gated_delta(problem, q, k, v, g, beta)
        check_state_form(state, problem.state_shape, step)
        y = q.new_empty(v.shape)
        if tokens == 0:
            return y
        # The tensors, too, as some may be converted and live no longer than their names.
        q, q_at, kind, q_stride = _rows("q", q)
        k, k_at, _, k_stride = _rows("k", k)
        v, v_at, _, v_stride = _rows("v", v)
        g, *g_is = _rows("g", g)
        beta, *beta_is = _rows("beta", beta)
        native().gated_delta(
            q_at,
            q_stride,
            k_at,
            k_stride,
            v_at,
            v_stride,
            kind,
            *g_is,
            *beta_is,
            y.data_ptr(),
            *_addresses(state, step, tokens),
            problem.num_key_heads,
            problem.num_value_heads,
            problem.key_dim,
            problem.value_dim,
            -1.0 if problem.normalise_eps is None else problem.normalise_eps,
            problem.channel_decay,
            self._isa(problem),
            torch.get_num_threads(),
        )
        return y


class NativeMamba2Scan(_Native):
    """The scan token by token, a few rows of a head's state at a time."""

    def run(
        self,
        problem: Mamba2ScanProblem,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        dt_bias: Tensor,
        state: Tensor | None,
        step: AttentionStep,
    ) -> Tensor:
        tokens = check_mamba2_scan(problem, x, dt, A, B, C, D, dt_bias)
        check_state_form(state, problem.state_shape, step)
        y = x.new_empty(x.shape)
        if tokens == 0:
            return y
        x, x_at, kind, x_stride = _rows("x", x)
        B, B_at, _, B_stride = _rows("B", B)
        C, C_at, _, C_stride = _rows("C", C)
        dt, *dt_is = _rows("dt", dt)
        A, A_at, A_type, _ = _rows("A", A)
        D, D_at, D_type, _ = _rows("D", D)
        dt_bias, dt_bias_at, dt_bias_type, _ = _rows("dt_bias", dt_bias)
        native().mamba2_scan(
            x_at,
            x_stride,
            B_at,
            B_stride,
            C_at,
            C_stride,
            kind,
            *dt_is,
            A_at,
            A_type,
            D_at,
            D_type,
            dt_bias_at,
            dt_bias_type,
            y.data_ptr(),
            *_addresses(state, step, tokens),
            problem.num_heads,
            problem.num_groups,
            problem.head_dim,
            problem.state_size,
            *problem.dt_limit,
            self._isa(problem),
            torch.get_num_threads(),
        )
        return y


class NativeCausalConv(_Native):
    """Blocks of channels, each token's inputs read once."""

    def run(
        self,
        problem: CausalConvProblem,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        state: Tensor | None,
        step: AttentionStep,
    ) -> Tensor:
        tokens = check_causal_conv(problem, x, weight, bias)
        check_state_form(state, problem.state_shape, step)
        y = x.new_empty(x.shape)
        if tokens == 0:
            return y
        x, x_at, kind, stride = _rows("x", x)
        weight, weight_at, weight_type, _ = _rows("the weight", contiguous("the weight", weight))
        bias_at = bias_type = 0
        if bias is not None:
            bias, bias_at, bias_type, _ = _rows("the bias", bias)
        native().causal_conv(
            x_at,
            stride,
            kind,
            weight_at,
            weight_type,
            bias_at,
            bias_type,
            y.data_ptr(),
            *_addresses(state, step, tokens),
            problem.channels,
            problem.kernel_size,
            problem.activation == "silu",
            self._isa(problem),
            torch.get_num_threads(),
        )
        return y


def _rows(name: str, x: Tensor) -> tuple[Tensor, int, int, int]:
    """Bring what belongs to a token side by side, in a dtype that native code reads; tokens may be further apart.

    x: [T, heads, size] or [T, channels], or [heads], which has no tokens.
    Returns the tensor, where it lies, its type, and how many elements apart the tokens are.
    """
    if not x.is_cpu:
        raise unfit(name, x, x.shape)
    if x.dtype not in FLOAT_TYPES or x.is_neg():
        x = floats(name, x)
    if x.ndim == 3:
        x, at, stride = strided_rows(name, x)
        return x, at, FLOAT_TYPES[x.dtype], stride
    try:
        strides = x.stride()
    except RuntimeError:  # a layout without strides
        raise unfit(name, x) from None
    if strides[-1] != 1:
        x = contiguous(name, x)
        strides = (*x.shape[1:], 1)
    size = (x.shape[0] - 1) * strides[0] + (x.shape[1] if x.ndim == 2 else 1)
    return x, address(name, x, size * x.itemsize), FLOAT_TYPES[x.dtype], strides[0]


def _addresses(state: Tensor | None, step: AttentionStep, tokens: int) -> tuple[int, ...]:
    """Return what the bindings take of a step: the state, the requests' starts and lengths, their number, and slots.

    The native code looks at the numbers in these tensors itself, at every call.
    """
    starts, lengths = step_numbers(step, "cu_seqlens_q"), step_numbers(step, "context_lens")
    count = lengths.numel()
    if lengths.ndim != 1 or starts.shape != (count + 1,):
        raise unfit("cu_seqlens_q", starts, (count + 1,), torch.int32, IndicesError)
    found = address("cu_seqlens_q", starts, count * 4 + 4), address("context_lens", lengths, count * 4), count
    if state is None:
        return 0, *found, 0, 0, tokens
    slots = step.state_slots
    if slots is None or slots.dtype is not torch.int64:
        raise unfit("state_slots", slots, (count,), torch.int64, IndicesError)
    slots = step_numbers(step, "state_slots", torch.int64)
    where = checked_address("state_slots", slots, (count,), torch.int64)
    return address("the state", state, state.numel() * 4), *found, where, state.shape[0], tokens
