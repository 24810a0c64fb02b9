"""The reference kernel for causal convolutions: a sum of shifted products, in float64."""

# T tokens, N requests alike, L new tokens of each, C channels, K kernel size

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pymllm.kernels.attention import AttentionStep
from pymllm.kernels.recurrence import CausalConvProblem, check_state, check_tensor
from pymllm.kernels.reference.states import alike_requests


class ReferenceCausalConv:
    """Each channel's last K inputs times its weights, the oldest first, whatever step they came in."""

    name = "reference"
    reproducible = False

    def why_not(self, problem: CausalConvProblem) -> str | None:
        return None

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
        for alike in alike_requests(step):
            before = alike.read(state, problem.state_shape).double().transpose(1, 2)
            inputs = torch.cat((before, x[alike.rows].double()), dim=1)  # [N, K - 1 + L, C]
            count = alike.rows.shape[1]
            total = torch.zeros((), dtype=torch.float64, device=x.device) if bias is None else bias.double()
            for at in range(problem.kernel_size):
                total = total + weight[:, at].double() * inputs[:, at : at + count]
            y[alike.rows] = (F.silu(total) if problem.activation == "silu" else total).to(y.dtype)
            alike.keep(state, inputs[:, count:].transpose(1, 2))
        return y


def check_causal_conv(problem: CausalConvProblem, x: Tensor, weight: Tensor, bias: Tensor | None) -> int:
    """Return the number of tokens.  Raises ValueError where a tensor does not fit the problem."""
    tokens = x.shape[0]
    check_tensor("x", x, (tokens, problem.channels), problem.dtype)
    check_tensor("weight", weight, (problem.channels, problem.kernel_size))
    if bias is not None:
        check_tensor("bias", bias, (problem.channels,))
    return tokens
