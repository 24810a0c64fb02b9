"""The gated delta rule, the scan of Mamba 2 and causal convolutions on the CPU in C++: `kernels/recurrence.h`.

Tokens are taken one after the other, in float32, in one order of sums: a request has the same bits however its prompt
is cut, whatever is beside it, and on any number of threads.
"""

# R requests, T tokens of this step

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pymllm.kernels.attention import AttentionStep
from pymllm.kernels.native.extension import isa_code, native, native_missing_reason
from pymllm.kernels.native.float_linear import FLOAT_TYPES, why_not_here
from pymllm.kernels.recurrence import (
    CausalConvProblem,
    GatedDeltaProblem,
    Mamba2ScanProblem,
    check_causal_conv,
    check_gated_delta,
    check_mamba2_scan,
    check_state,
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
        check_state(state, problem.state_shape, step, tokens)
        y = q.new_empty(v.shape)
        if tokens == 0:
            return y
        q, k, v, g, beta = (_rows(x) for x in (q, k, v, g, beta))
        native().gated_delta(
            q.data_ptr(),
            q.stride(0),
            k.data_ptr(),
            k.stride(0),
            v.data_ptr(),
            v.stride(0),
            FLOAT_TYPES[y.dtype],
            g.data_ptr(),
            FLOAT_TYPES[g.dtype],
            g.stride(0),
            beta.data_ptr(),
            FLOAT_TYPES[beta.dtype],
            beta.stride(0),
            y.data_ptr(),
            *_addresses(state, step),
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
        check_state(state, problem.state_shape, step, tokens)
        y = x.new_empty(x.shape)
        if tokens == 0:
            return y
        x, dt, A, B, C, D, dt_bias = (_rows(t) for t in (x, dt, A, B, C, D, dt_bias))
        native().mamba2_scan(
            x.data_ptr(),
            x.stride(0),
            B.data_ptr(),
            B.stride(0),
            C.data_ptr(),
            C.stride(0),
            FLOAT_TYPES[y.dtype],
            dt.data_ptr(),
            FLOAT_TYPES[dt.dtype],
            dt.stride(0),
            A.data_ptr(),
            FLOAT_TYPES[A.dtype],
            D.data_ptr(),
            FLOAT_TYPES[D.dtype],
            dt_bias.data_ptr(),
            FLOAT_TYPES[dt_bias.dtype],
            y.data_ptr(),
            *_addresses(state, step),
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
        check_state(state, problem.state_shape, step, tokens)
        y = x.new_empty(x.shape)
        if tokens == 0:
            return y
        x, weight = _rows(x), _rows(weight).contiguous()
        bias = None if bias is None else _rows(bias)
        native().causal_conv(
            x.data_ptr(),
            x.stride(0),
            FLOAT_TYPES[y.dtype],
            weight.data_ptr(),
            FLOAT_TYPES[weight.dtype],
            0 if bias is None else bias.data_ptr(),
            0 if bias is None else FLOAT_TYPES[bias.dtype],
            y.data_ptr(),
            *_addresses(state, step),
            problem.channels,
            problem.kernel_size,
            problem.activation == "silu",
            self._isa(problem),
            torch.get_num_threads(),
        )
        return y


def _rows(x: Tensor) -> Tensor:
    """Bring what belongs to a token side by side, in a dtype that native code reads; tokens may be further apart."""
    if not x.is_cpu:
        raise ValueError(f"the native kernels read tensors on the CPU, not on {x.device}")
    if x.dtype not in FLOAT_TYPES:
        x = x.float()
    if x.stride(-1) == 1 and (x.ndim < 3 or x.stride(1) == x.shape[2]):
        return x
    return x.contiguous()


# The native code reads what it finds at addresses, without looking: `check_state` has looked, once a step. The tensors
# at the end of the tuple keep the addresses alive.


def _addresses(state: Tensor | None, step: AttentionStep) -> tuple[int, int, int, int, int]:
    """Return the addresses of the state, of the requests' starts and lengths, their number, and that of their slots."""
    where = step.checked("native states", lambda: _where(step))
    return (0, *where[:3], 0) if state is None else (state.data_ptr(), *where[:4])


def _where(step: AttentionStep) -> tuple[int, int, int, int, Tensor, Tensor, Tensor | None]:
    assert step.cu_seqlens_q is not None and step.context_lens is not None
    starts = step.cu_seqlens_q.to("cpu", torch.int32).contiguous()
    lengths = step.context_lens.to("cpu", torch.int32).contiguous()
    slots = step.state_slots
    slots = None if slots is None else slots.to("cpu").contiguous()
    address = 0 if slots is None else slots.data_ptr()
    return starts.data_ptr(), lengths.data_ptr(), step.num_reqs, address, starts, lengths, slots
