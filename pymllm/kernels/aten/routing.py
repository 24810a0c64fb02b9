"""Routing in torch operations, for any device and any float dtype."""

# T tokens, E experts, K experts a token, N groups of experts

from __future__ import annotations

import torch
from torch import Tensor

from pymllm.kernels.routing import SMALLEST_SUM, Routing, RoutingProblem


class TorchRouting:
    """Routing, every step of it a torch operation."""

    name = "torch"

    def why_not(self, problem: RoutingProblem) -> str | None:
        return None

    def run(self, routing: Routing, logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Route as `RoutingKernel.run` says."""
        scores = _scores(routing, logits.float())
        ranked = scores if bias is None else scores + bias.float()
        if routing.groups > 1:
            ranked = _within_groups(routing, ranked)
        ids = ranked.topk(routing.top_k, dim=-1).indices
        weights = scores.gather(-1, ids)
        if routing.scoring == "topk_softmax":
            weights = weights.softmax(-1)
        elif routing.renormalizes:
            weights = weights / (weights.sum(-1, keepdim=True) + SMALLEST_SUM)
        return weights * routing.scale, ids


def _scores(routing: Routing, logits: Tensor) -> Tensor:
    """Score every expert for every token.  logits: [T, E] float32.  Returns [T, E] float32."""
    if routing.scoring == "topk_softmax":
        return logits
    return logits.sigmoid() if routing.scoring == "sigmoid" else logits.softmax(-1)


def _within_groups(routing: Routing, ranked: Tensor) -> Tensor:
    """Mask the experts outside of the kept groups with minus infinity.  ranked: [T, E].  Returns [T, E]."""
    groups = ranked.unflatten(-1, (routing.groups, -1))  # [T, N, E/N]
    best = groups.topk(routing.group_best, dim=-1).values.sum(-1)
    kept = best.topk(routing.kept_groups, dim=-1).indices  # [T, kept_groups]
    allowed = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, kept, True)
    return groups.masked_fill(~allowed.unsqueeze(-1), -torch.inf).flatten(-2)
