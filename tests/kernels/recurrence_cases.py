"""Steps of requests with states, and the recurrences written out a token at a time in float64.

A request is (new tokens, tokens before them, slot).
"""

# T tokens, S slots, N state size

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from pymllm.kernels.attention import AttentionStep
from pymllm.kernels.hardware import probe_device
from pymllm.kernels.recurrence import CausalConvProblem, GatedDeltaProblem, Mamba2ScanProblem

from ..tensors import floats

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Half a unit in the last place, relative, for the rounding of the result.
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SLOTS = 7

# Slots in any order, fresh ones and continued, one that keeps nothing, and one that brings no token.
MIXED = ((5, 0, 4), (1, 9, 0), (70, 3, 6), (1, 0, 2), (0, 8, 3), (3, 0, -1), (2, 6, 1))
STEPS = {
    "nothing": (),
    "no token": ((0, 3, 1),),
    "decoding": ((1, 4, 3), (1, 0, 5), (1, 77, 0)),
    "mixed": MIXED,
}


def step_of(requests, device="cpu", *, slots=True) -> AttentionStep:
    """Describe a step of such requests.  slots: False: nothing is kept."""
    counts = torch.tensor([new for new, _, _ in requests], dtype=torch.int32)
    return AttentionStep(
        cu_seqlens_q=F.pad(counts.cumsum(0), (1, 0)).int().to(device),
        context_lens=torch.tensor(
            [new + before for new, before, _ in requests], dtype=torch.int32, device=device
        ),
        max_seqlen_q=max(counts.tolist(), default=0),
        state_slots=torch.tensor([slot for _, _, slot in requests], dtype=torch.int64, device=device)
        if slots
        else None,
    )


def gated_delta(problem: GatedDeltaProblem, q, k, v, g, beta, state):
    """Run the rule over one request, T tokens.  Returns the outputs and the state, float64."""
    q, k, v, g, beta, state = (t.double() for t in (q, k, v, g, beta, state))
    outputs = []
    for t in range(q.shape[0]):
        rows = []
        for head in range(problem.num_value_heads):
            shared = head * problem.num_key_heads // problem.num_value_heads
            query, key = q[t, shared], k[t, shared]
            if problem.normalise_eps is not None:
                query = query / (query.dot(query) + problem.normalise_eps).sqrt()
                key = key / (key.dot(key) + problem.normalise_eps).sqrt()
            state[head] *= g[t, head].exp()
            state[head] += torch.outer(key, beta[t, head] * (v[t, head] - key @ state[head]))
            rows.append(query / problem.key_dim**0.5 @ state[head])
        outputs.append(torch.stack(rows))
    return torch.stack(outputs) if outputs else v.clone(), state


def mamba2_scan(problem: Mamba2ScanProblem, x, dt, A, B, C, D, dt_bias, state):
    """Scan one request, T tokens.  Returns the outputs and the state, float64."""
    x, dt, A, B, C, D, dt_bias, state = (t.double() for t in (x, dt, A, B, C, D, dt_bias, state))
    outputs = []
    for t in range(x.shape[0]):
        rows = []
        for head in range(problem.num_heads):
            group = head * problem.num_groups // problem.num_heads
            size = torch.logaddexp(dt[t, head] + dt_bias[head], dt.new_zeros(())).clamp(*problem.dt_limit)
            state[head] = state[head] * (size * A[head]).exp() + torch.outer(size * x[t, head], B[t, group])
            rows.append(state[head] @ C[t, group] + D[head] * x[t, head])
        outputs.append(torch.stack(rows))
    return torch.stack(outputs) if outputs else x.clone(), state


def causal_conv(problem: CausalConvProblem, x, weight, bias, state):
    """Convolve one request's tokens.  Returns the outputs and the state, float64."""
    inputs = torch.cat((state.double().T, x.double()))
    size = problem.kernel_size
    outputs = torch.stack(
        [(inputs[t : t + size] * weight.double().T).sum(0) for t in range(x.shape[0])] or [x[:0].sum(0)]
    )[: x.shape[0]].double()
    outputs = outputs if bias is None else outputs + bias.double()
    if problem.activation == "silu":
        outputs = outputs / (1 + (-outputs).exp())
    return outputs, inputs[x.shape[0] :].T


@dataclass(frozen=True)
class Case:
    """A layer's problem, and its inputs for T tokens.

    tokens: the inputs with a row a token, by name; others: the layer's own.  recurrence: the float64 one of a request.
    """

    operation: str
    problem: Any
    tokens: dict[str, torch.Tensor]
    others: dict[str, Any]
    recurrence: Any

    def to(self, device) -> Case:
        """Move all tensors."""

        def moved(tensors):
            return {n: t.to(device) if isinstance(t, torch.Tensor) else t for n, t in tensors.items()}

        device_of = probe_device(str(device).partition(":")[0])
        return replace(
            self,
            problem=replace(self.problem, device=device_of),
            tokens=moved(self.tokens),
            others=moved(self.others),
        )

    def slice(self, begin: int, end: int) -> Case:
        return replace(self, tokens={name: t[begin:end] for name, t in self.tokens.items()})

    def state(self, slots: int = SLOTS) -> torch.Tensor:
        """Make states of the size that they have after some tokens."""
        scale = 1.0 if self.operation == "causal_conv" else 0.3
        device = next(iter(self.tokens.values())).device
        return floats(slots, *self.problem.state_shape, seed=9, scale=scale).to(device)

    def run(self, kernel, state, step) -> torch.Tensor:
        return kernel.run(self.problem, **self.tokens, **self.others, state=state, step=step)

    def exact(self, requests, state) -> tuple[torch.Tensor, torch.Tensor]:
        """Run each request of a step in float64.  Returns the outputs and all states; state None: nothing is kept."""
        cpu = self.to("cpu")
        empty = torch.zeros(self.problem.state_shape)
        after = torch.empty(0) if state is None else state.cpu().double()
        outputs, at = [], 0
        for new, before, slot in requests:
            held = state is not None and slot >= 0
            begun = after[slot].clone() if held and before else empty.double()
            piece = cpu.slice(at, at + new)
            y, ended = self.recurrence(self.problem, **piece.tokens, **piece.others, state=begun)
            outputs.append(y)
            if held and new:
                after[slot] = ended
            at += new
        return torch.cat(outputs) if outputs else torch.empty(0), after


def strided(*shape: int, dtype, seed: int, scale: float = 1.0) -> torch.Tensor:
    """Draw numbers whose tokens are further apart than they are long, as parts of a fused projection are."""
    size = torch.Size(shape[1:]).numel()
    wide = floats(shape[0], 3 + size + 2, dtype=dtype, seed=seed, scale=scale)
    return wide[:, 3 : 3 + size].view(shape)


def gated_delta_case(tokens, hk, hv, dk, dv, dtype=torch.float32, eps=1e-6, small=None) -> Case:
    """small: the dtype of g and beta."""
    problem = GatedDeltaProblem(
        num_key_heads=hk, num_value_heads=hv, key_dim=dk, value_dim=dv, dtype=dtype,
        device=probe_device("cpu"), normalise_eps=eps,
    )  # fmt: skip
    scale = 1.0 if eps is not None else dk**-0.5
    values = {
        "q": strided(tokens, hk, dk, dtype=dtype, seed=1, scale=scale),
        "k": strided(tokens, hk, dk, dtype=dtype, seed=2, scale=scale),
        "v": strided(tokens, hv, dv, dtype=dtype, seed=3),
        # From decays of nearly 1 to some of nearly 0.
        "g": -(floats(tokens, hv, seed=4) * 2).exp().mul(0.1).to(small or torch.float32),
        "beta": floats(tokens, hv, seed=5).sigmoid().to(small or dtype),
    }
    return Case("gated_delta", problem, values, {}, gated_delta)


def mamba2_case(
    tokens, heads, head_dim, groups, size, dtype=torch.float32, limit=(0.0, float("inf"))
) -> Case:
    problem = Mamba2ScanProblem(
        num_heads=heads, head_dim=head_dim, num_groups=groups, state_size=size, dtype=dtype,
        device=probe_device("cpu"), dt_limit=limit,
    )  # fmt: skip
    values = {
        "x": strided(tokens, heads, head_dim, dtype=dtype, seed=1),
        "dt": strided(tokens, heads, dtype=dtype, seed=2),
        "B": strided(tokens, groups, size, dtype=dtype, seed=3),
        "C": strided(tokens, groups, size, dtype=dtype, seed=4),
    }
    others = {
        "A": -floats(heads, seed=5).exp(),
        "D": floats(heads, dtype=dtype, seed=6),
        "dt_bias": floats(heads, dtype=dtype, seed=7) - 2,
    }
    return Case("mamba2_scan", problem, values, others, mamba2_scan)


def conv_case(tokens, channels, size, dtype=torch.float32, activation="silu", bias=True) -> Case:
    problem = CausalConvProblem(
        channels=channels, kernel_size=size, dtype=dtype, device=probe_device("cpu"), activation=activation
    )
    others = {
        "weight": floats(channels, size, dtype=dtype, seed=2),
        "bias": floats(channels, dtype=dtype, seed=3) if bias else None,
    }
    return Case(
        "causal_conv", problem, {"x": strided(tokens, channels, dtype=dtype, seed=1)}, others, causal_conv
    )


def small_cases(tokens: int, dtype=torch.float32) -> list[Case]:
    """Make one case of each operation, of odd sizes."""
    return [
        gated_delta_case(tokens, 2, 4, 12, 37, dtype),
        mamba2_case(tokens, 4, 10, 2, 19, dtype),
        conv_case(tokens, 300, 4, dtype),
    ]


def tokens_of(requests) -> int:
    return sum(new for new, _, _ in requests)


def assert_near(found, exact, dtype, bound: float) -> None:
    """Assert that found is the rounding to its dtype of what is within `bound` of the largest exact number."""
    assert found.dtype is dtype
    assert found.shape == exact.shape or found.numel() == exact.numel() == 0
    if found.numel():
        error = (found.cpu().double() - exact).abs() - 1.01 * UNIT[dtype] * exact.abs()
        subnormal = 2.0**-24 if dtype is torch.float16 else 0.0
        assert error.max() <= bound * exact.abs().max() + subnormal, float(error.max() / exact.abs().max())
