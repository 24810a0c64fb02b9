"""The gated delta rule, the scan of Mamba 2 and causal convolutions on the GPU.

A block keeps some columns or rows of one request's state in registers, and takes its tokens one after the other: what
decoding needs, and the same bits however a prompt is cut. A long prompt of one request fills a GPU badly so. The host
does not wait for the device: blocks read where requests lie, so a CUDA graph serves any requests.
"""

# R requests, T tokens of this step, S slots

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pymllm.kernels.attention import AttentionStep
from pymllm.kernels.hardware import Device
from pymllm.kernels.recurrence import (
    CausalConvProblem,
    GatedDeltaProblem,
    Mamba2ScanProblem,
    check_causal_conv,
    check_gated_delta,
    check_mamba2_scan,
    check_state,
)
from pymllm.kernels.triton.ahead_of_time import Case
from pymllm.kernels.triton.recurrence_kernels import convolve, delta_rule, keep_inputs, scan_tokens
from pymllm.kernels.triton.requirements import FLOATS, why_not_device
from pymllm.kernels.triton.tuning import divide, next_power

BLOCK_ELEMENTS = 2048  # of a state, in the registers of 32 lanes
LARGEST_SIDE = 512  # of a state, along which a block sums
LARGEST_KERNEL = 32


class _Triton:
    """A kernel with a state a request in registers."""

    name = "triton"
    device_type = "cuda"  # the only one it runs on
    capturable = True
    reproducible = True

    def why_not(self, problem: Any) -> str | None:
        if problem.dtype not in (*FLOATS, torch.float32):
            return f"computes in float32, float16 or bfloat16, not in {problem.dtype}"
        return why_not_device(problem.device)


class TritonGatedDelta(_Triton):
    """The rule token by token."""

    def why_not(self, problem: GatedDeltaProblem) -> str | None:
        if problem.key_dim > LARGEST_SIDE:
            return f"takes keys of up to {LARGEST_SIDE} elements, not {problem.key_dim}"
        return super().why_not(problem)

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
        return self.launch(problem, q, k, v, g, beta, state, step)

    def launch(
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
        """Run the rule over tensors that fit the problem."""
        y = q.new_empty(v.shape)
        if not y.numel():
            return y
        q, k, v, g, beta = (_rows(x) for x in (q, k, v, g, beta))
        side = next_power(problem.key_dim)
        block = min(next_power(problem.value_dim), BLOCK_ELEMENTS // side)
        delta_rule.launch(
            (step.num_reqs, problem.num_value_heads, divide(problem.value_dim, block)),
            q,
            k,
            v,
            g,
            beta,
            y,
            *_state_of(state, step, y.device),
            *(x.stride(0) for x in (q, k, v, g, beta)),
            problem.key_dim**-0.5,
            problem.normalise_eps or 0.0,
            HEADS=problem.num_value_heads,
            GROUP=problem.num_value_heads // problem.num_key_heads,
            DK=problem.key_dim,
            DV=problem.value_dim,
            NORMALISE=problem.normalise_eps is not None,
            CHANNELS=problem.channel_decay,
            BLOCK_K=side,
            BLOCK_V=block,
            num_warps=1,
        )
        return y

    def cases(self, device: Device) -> Iterator[Case]:
        for keys, values, size, dtype, channels in (
            (16, 32, 128, torch.bfloat16, False),
            (4, 4, 256, torch.float16, False),
            (32, 32, 128, torch.bfloat16, True),
        ):
            problem = GatedDeltaProblem(
                num_key_heads=keys,
                num_value_heads=values,
                key_dim=size,
                value_dim=size,
                dtype=dtype,
                device=device,
                normalise_eps=1e-6,
                channel_decay=channels,
            )

            def run(problem: GatedDeltaProblem = problem) -> None:
                q = _meta(problem.dtype, 8, problem.num_key_heads, problem.key_dim)
                v = _meta(problem.dtype, 8, problem.num_value_heads, problem.value_dim)
                beta = _meta(problem.dtype, 8, problem.num_value_heads)
                g = v.float() if problem.channel_decay else beta.float()
                state, step = _meta_state(problem)
                self.launch(problem, q, q, v, g, beta, state, step)

            title = f"{values} heads of {size}, {str(dtype).removeprefix('torch.')}"
            yield Case(f"{title}, a decay of each channel" if channels else title, run)


class TritonMamba2Scan(_Triton):
    """The scan token by token."""

    def why_not(self, problem: Mamba2ScanProblem) -> str | None:
        if problem.state_size > LARGEST_SIDE:
            return f"takes states of up to {LARGEST_SIDE} elements, not {problem.state_size}"
        return super().why_not(problem)

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
        return self.launch(problem, x, dt, A, B, C, D, dt_bias, state, step)

    def launch(
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
        """Scan tensors that fit the problem."""
        y = x.new_empty(x.shape)
        if not y.numel():
            return y
        x, dt, A, B, C, D, dt_bias = (_rows(t) for t in (x, dt, A, B, C, D, dt_bias))
        side = next_power(problem.state_size)
        block = min(next_power(problem.head_dim), BLOCK_ELEMENTS // side)
        scan_tokens.launch(
            (step.num_reqs, problem.num_heads, divide(problem.head_dim, block)),
            x,
            dt,
            A,
            B,
            C,
            D,
            dt_bias,
            y,
            *_state_of(state, step, y.device),
            *(t.stride(0) for t in (x, dt, B, C)),
            *(float(limit) for limit in problem.dt_limit),
            HEADS=problem.num_heads,
            SHARED=problem.num_heads // problem.num_groups,
            P=problem.head_dim,
            N=problem.state_size,
            BLOCK_P=block,
            BLOCK_N=side,
            num_warps=1,
        )
        return y

    def cases(self, device: Device) -> Iterator[Case]:
        for heads, size, groups, states in ((64, 64, 8, 128), (24, 64, 1, 256)):
            problem = Mamba2ScanProblem(
                num_heads=heads,
                head_dim=size,
                num_groups=groups,
                state_size=states,
                dtype=torch.bfloat16,
                device=device,
            )

            def run(problem: Mamba2ScanProblem = problem) -> None:
                x = _meta(problem.dtype, 8, problem.num_heads, problem.head_dim)
                b = _meta(problem.dtype, 8, problem.num_groups, problem.state_size)
                a = _meta(torch.float32, problem.num_heads)
                state, step = _meta_state(problem)
                self.launch(problem, x, x[..., 0], a, b, b, a.to(problem.dtype), a, state, step)

            yield Case(f"{heads} heads of {size}, {states} states", run)


class TritonCausalConv(_Triton):
    """Blocks of tokens and channels; then the last inputs are put into the states."""

    def why_not(self, problem: CausalConvProblem) -> str | None:
        if problem.kernel_size > LARGEST_KERNEL:
            return f"takes kernels of up to {LARGEST_KERNEL} tokens, not {problem.kernel_size}"
        return super().why_not(problem)

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
        return self.launch(problem, x, weight, bias, state, step)

    def launch(
        self,
        problem: CausalConvProblem,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        state: Tensor | None,
        step: AttentionStep,
    ) -> Tensor:
        """Run the convolution over tensors that fit the problem."""
        y = x.new_empty(x.shape)
        if not y.numel():
            return y
        x, weight, past = _rows(x), weight.contiguous(), problem.kernel_size - 1
        state = state if past else None
        state, starts, lengths, slots = _state_of(state, step, y.device)
        tokens, channels = min(next_power(step.max_seqlen_q), 16), min(next_power(problem.channels), 128)
        blocks = divide(problem.channels, channels)
        convolve.launch(
            (step.num_reqs, divide(step.max_seqlen_q, tokens), blocks),
            x,
            weight,
            None if bias is None else bias.contiguous(),
            y,
            state,
            starts,
            lengths,
            slots,
            x.stride(0),
            C=problem.channels,
            K=problem.kernel_size,
            SILU=problem.activation == "silu",
            BLOCK_T=tokens,
            BLOCK_C=channels,
            num_warps=4,
        )
        if state is not None:
            keep_inputs.launch(
                (step.num_reqs, blocks),
                x,
                state,
                starts,
                lengths,
                slots,
                x.stride(0),
                C=problem.channels,
                PAST=past,
                BLOCK_C=channels,
                BLOCK_K=next_power(past),
                num_warps=4,
            )
        return y

    def cases(self, device: Device) -> Iterator[Case]:
        for channels, size, tokens, activation in ((8192, 4, 1, "silu"), (2048, 3, 64, None)):
            problem = CausalConvProblem(
                channels=channels,
                kernel_size=size,
                dtype=torch.bfloat16,
                device=device,
                activation="silu" if activation else None,
            )

            def run(problem: CausalConvProblem = problem, tokens: int = tokens) -> None:
                x = _meta(problem.dtype, 8 * tokens, problem.channels)
                weight = _meta(problem.dtype, problem.channels, problem.kernel_size)
                state, step = _meta_state(problem, tokens)
                self.launch(problem, x, weight, weight[:, 0], state, step)

            yield Case(f"{channels} channels, {size} tokens, {tokens} new", run)


def _rows(x: Tensor) -> Tensor:
    """Bring what belongs to a token side by side; tokens may be further apart."""
    return x if x.stride(-1) == 1 and (x.ndim < 3 or x.stride(1) == x.shape[2]) else x.contiguous()


def _state_of(state: Tensor | None, step: AttentionStep, device: torch.device) -> tuple[Tensor | None, ...]:
    """Return the state, and what kernels read of a step: starts, lengths, slots (None without a state)."""
    slots = None if state is None else step.state_slots
    tensors = (step.cu_seqlens_q, step.context_lens, slots)
    return (state, *(None if tensor is None else tensor.to(device) for tensor in tensors))


def _meta(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _meta_state(problem: Any, tokens: int = 1) -> tuple[Tensor, AttentionStep]:
    """Make a state, and a step of 8 requests, on meta."""
    step = AttentionStep(
        cu_seqlens_q=_meta(torch.int32, 9),
        context_lens=_meta(torch.int32, 8),
        state_slots=_meta(torch.int64, 8),
        max_seqlen_q=tokens,
    )
    return _meta(torch.float32, 16, *problem.state_shape), step
