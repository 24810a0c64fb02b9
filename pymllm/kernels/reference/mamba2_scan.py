"""The reference kernel for the scan of Mamba 2: pieces of a prompt as products of matrices, in float64.

Within a piece, with G the running sum of dt * A and S the state before it: y = exp(G) * (S @ C) + D * x, and of every
token j up to i, exp(G_i - G_j) * (C_i . B_j) * dt_j * x_j.  It is the scan token by token, written out.
"""

# T tokens, N requests alike, L tokens of a piece, H heads, P head size, G groups, Z state size

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pymllm.kernels.attention import AttentionStep
from pymllm.kernels.recurrence import Mamba2ScanProblem, check_state, check_tensor
from pymllm.kernels.reference.gated_delta import LEAST_DECAY, PIECE
from pymllm.kernels.reference.states import alike_requests


class ReferenceMamba2Scan:
    """The scan in float64, the state in float32 between steps."""

    name = "reference"
    reproducible = False

    def why_not(self, problem: Mamba2ScanProblem) -> str | None:
        return None

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
        repeats = problem.num_heads // problem.num_groups
        for alike in alike_requests(step):
            # [N, H, L, ...]
            inputs = x[alike.rows].double().transpose(1, 2)
            steps = F.softplus(dt[alike.rows].double() + dt_bias.double()).clamp(*problem.dt_limit)
            decays = (steps * A.double()).clamp(min=LEAST_DECAY).transpose(1, 2)
            stepped = inputs * steps.transpose(1, 2)[..., None]
            to_state, from_state = (
                t[alike.rows].double().repeat_interleave(repeats, dim=2).transpose(1, 2) for t in (B, C)
            )
            kept = alike.read(state, problem.state_shape).double()
            for at in range(0, alike.rows.shape[1], PIECE):
                piece = slice(at, at + PIECE)
                outputs, kept = _piece(
                    kept, *(t[:, :, piece] for t in (stepped, decays, to_state, from_state))
                )
                outputs = outputs + D.double()[:, None, None] * inputs[:, :, piece]
                y[alike.rows[:, piece]] = outputs.transpose(1, 2).to(y.dtype)
            alike.keep(state, kept)
        return y


def check_mamba2_scan(
    problem: Mamba2ScanProblem,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
) -> int:
    """Return the number of tokens.  Raises ValueError where a tensor does not fit the problem."""
    tokens, heads = x.shape[0], problem.num_heads
    check_tensor("x", x, (tokens, heads, problem.head_dim), problem.dtype)
    check_tensor("dt", dt, (tokens, heads))
    for name, tensor in (("B", B), ("C", C)):
        check_tensor(name, tensor, (tokens, problem.num_groups, problem.state_size), problem.dtype)
    for name, tensor in (("A", A), ("D", D), ("dt_bias", dt_bias)):
        check_tensor(name, tensor, (heads,))
    return tokens


def _piece(state: Tensor, x: Tensor, g: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Scan a piece.

    state: [N, H, P, Z].  x: [N, H, L, P], times dt.  g: [N, H, L], the logarithms of the decays.  B, C: [N, H, L, Z].
    Returns the outputs, [N, H, L, P], and the state after the piece.
    """
    sums = g.cumsum(-1)
    later = torch.ones(sums.shape[-1:] * 2, dtype=torch.bool, device=g.device).triu(1)
    between = (sums[..., :, None] - sums[..., None, :]).masked_fill(later, -torch.inf).exp()
    outputs = sums.exp()[..., None] * (C @ state.mT) + ((C @ B.mT) * between) @ x
    until = (sums[..., -1:] - sums).exp()[..., None]
    return outputs, sums[..., -1].exp()[..., None, None] * state + (x * until).mT @ B
