"""Experts in float64, a token's slot at a time: what kernels of experts are tested against."""

# T tokens, K experts a token, E experts, H hidden size, I intermediate size

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pymllm.kernels.experts import ExpertsBias, ExpertsWeight


def silu_and_mul(both: Tensor) -> Tensor:
    """[2 I] gate and up -> [I]."""
    gate, up = both.chunk(2)
    return gate * torch.sigmoid(gate) * up


def expected_experts(
    weight: ExpertsWeight,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    bias: ExpertsBias,
    activation: Callable[[Tensor], Tensor] = silu_and_mul,
) -> Tensor:
    """Sum the answers of each token's experts.

    x: [T, H].  ids: [T, K], below 0 for none.  weights: [T, K].  activation: [2 I] -> [I].  Returns [T, H] float64.
    """
    gate_up = [
        torch.cat([w.dequantize(torch.float64) for w in parts]) for parts in zip(*weight.gate_up, strict=True)
    ]
    down = [w.dequantize(torch.float64) for w in weight.down]
    y = torch.zeros(x.shape, dtype=torch.float64)
    for token, k in torch.cartesian_prod(*map(torch.arange, ids.shape)).tolist():
        e = int(ids[token, k])
        if e < 0:
            continue
        both = gate_up[e] @ x[token].double()
        both += 0 if bias.gate_up is None else bias.gate_up[e].double()
        answer = down[e] @ activation(both)
        answer += 0 if bias.down is None else bias.down[e].double()
        y[token] += float(weights[token, k]) * answer
    return y


def routed(tokens: int, top_k: int, experts: int, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Draw expert ids [T, K], some below 0 and some twice, and float32 weights [T, K]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, experts, (tokens, top_k), generator=generator)
    return ids, torch.rand(tokens, top_k, generator=generator)
