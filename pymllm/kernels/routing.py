"""The contract of routing kernels: the rule by which logits become the experts of a token, and their weights."""

# T tokens, E experts, K experts a token, N groups of experts

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from pymllm.kernels.hardware import Device

SMALLEST_SUM = 1e-20  # added to the sum that weights are divided by


@dataclass(frozen=True, kw_only=True)
class Routing:
    """The rule of a router.

    scoring: softmax or sigmoid over all experts, or topk_softmax: softmax over the logits of the chosen experts.
    renormalize: whether the weights of a token's experts are divided by their sum, where they are several.
    single_weighs_one: whether the weight of a token's only expert is, too.  scale: multiplies the weights at the end.
    groups: the experts lie in so many groups of equal size; a token's experts are chosen from its kept_groups best.
    group_best: a group's score is the sum of so many of its best scores.
    """

    top_k: int
    scoring: Literal["softmax", "sigmoid", "topk_softmax"] = "softmax"
    renormalize: bool = True
    single_weighs_one: bool = False
    scale: float = 1.0
    groups: int = 1
    kept_groups: int = 1
    group_best: int = 1

    @property
    def renormalizes(self) -> bool:
        """True where weights are divided by their sum; topk_softmax has made the sum 1 already."""
        several = self.top_k > 1 or self.single_weighs_one
        return self.renormalize and several and self.scoring != "topk_softmax"


@dataclass(frozen=True)
class RoutingProblem:
    """The router of one layer, as a kernel sees it.  dtype: that of its logits."""

    routing: Routing
    num_experts: int
    dtype: torch.dtype
    device: Device


class RoutingKernel(Protocol):
    """A kernel that chooses the experts of each token and their weights from logits, in float32."""

    name: str

    def why_not(self, problem: RoutingProblem) -> str | None: ...

    def run(self, routing: Routing, logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Choose and weigh the experts of each token.

        logits: [T, E], any float dtype.  bias: [E], added to the scores for choosing, not for weighing.
        Returns weights [T, K] float32 and ids [T, K] int64, the best expert first; the order of experts with the same
        score is the kernel's choice. No id is outside the experts, whatever the logits.
        """
