"""The reference kernel for the gated delta rule: pieces of a prompt as products of matrices, in float64.

Within a piece of L tokens, with G the running sum of g and S the state before it, the corrections U of all tokens solve
one triangular system, (1 + A) U = beta * (v - exp(G) * (k @ S)), where A_ij = beta_i * (k_i . k_j) * exp(G_i - G_j) for
j < i.  Outputs and the next state are then products: it is the rule token by token, written out.  float64, because
solving the system in float32 would cost more digits than a piece may.
"""

# T tokens, N requests alike, L tokens of a piece, Hv value heads, Dk key size, Dv value size

from __future__ import annotations

import torch
from torch import Tensor

from pymllm.kernels.attention import AttentionStep
from pymllm.kernels.recurrence import GatedDeltaProblem, check_state, check_tensor
from pymllm.kernels.reference.states import alike_requests

PIECE = 64  # tokens
# exp of it is 0 in float64, and differences of sums of it are numbers, as those of minus infinity are not.
LEAST_DECAY = -1e4


class ReferenceGatedDelta:
    """The rule in float64, the state in float32 between steps."""

    name = "reference"
    reproducible = False

    def why_not(self, problem: GatedDeltaProblem) -> str | None:
        return None

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
        repeats = problem.num_value_heads // problem.num_key_heads
        for alike in alike_requests(step):
            # [N, Hv, L, ...]
            keys, queries = (
                _normalised(x[alike.rows].double(), problem.normalise_eps)
                .repeat_interleave(repeats, dim=2)
                .transpose(1, 2)
                for x in (k, q)
            )
            values, decays, betas = (x[alike.rows].double().transpose(1, 2) for x in (v, g, beta))
            queries = queries * problem.key_dim**-0.5
            decays = decays.clamp(min=LEAST_DECAY)
            matrix = alike.read(state, problem.state_shape).double()
            for at in range(0, alike.rows.shape[1], PIECE):
                piece = slice(at, at + PIECE)
                inputs = (x[:, :, piece] for x in (queries, keys, values, decays, betas))
                outputs, matrix = _piece(matrix, *inputs)
                y[alike.rows[:, piece]] = outputs.transpose(1, 2).to(y.dtype)
            alike.keep(state, matrix)
        return y


def check_gated_delta(
    problem: GatedDeltaProblem, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor
) -> int:
    """Return the number of tokens.  Raises ValueError where a tensor does not fit the problem."""
    tokens = q.shape[0]
    for name, tensor in (("q", q), ("k", k)):
        check_tensor(name, tensor, (tokens, problem.num_key_heads, problem.key_dim), problem.dtype)
    check_tensor("v", v, (tokens, problem.num_value_heads, problem.value_dim), problem.dtype)
    for name, tensor in (("g", g), ("beta", beta)):
        check_tensor(name, tensor, (tokens, problem.num_value_heads))
    return tokens


def _normalised(x: Tensor, eps: float | None) -> Tensor:
    return x if eps is None else x * (x.square().sum(-1, keepdim=True) + eps).rsqrt()


def _piece(matrix: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Run the rule over a piece.

    matrix: [N, Hv, Dk, Dv].  q, k: [N, Hv, L, Dk].  v: [N, Hv, L, Dv].  g, beta: [N, Hv, L].
    Returns the outputs, [N, Hv, L, Dv], and the matrix after the piece.
    """
    sums = g.cumsum(-1)
    later = torch.ones(sums.shape[-1:] * 2, dtype=torch.bool, device=g.device).triu(1)
    between = (sums[..., :, None] - sums[..., None, :]).masked_fill(later, -torch.inf).exp()
    beta, since = beta[..., None], sums.exp()[..., None]
    system = (beta * (k @ k.mT) * between).tril(-1)
    wanted = beta * (v - since * (k @ matrix))
    corrections = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    outputs = since * (q @ matrix) + ((q @ k.mT) * between) @ corrections
    until = (sums[..., -1:] - sums).exp()[..., None]
    return outputs, since[..., -1:, :] * matrix + (k * until).mT @ corrections
