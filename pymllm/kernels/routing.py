"""What routing kernels are asked: by which rule logits become the experts of a token, and their weights."""

# T tokens, E experts, K experts a token, N groups of experts

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from pymllm.kernels.hardware import Device

SMALLEST_SUM = 1e-20  # added to a sum of weights that is divided by


@dataclass(frozen=True, kw_only=True)
class Routing:
    """The rule of a router.

    scoring: softmax or sigmoid over all experts, or topk_softmax: softmax over the chosen ones' logits.
    renormalize: whether the weights of several experts are divided by their sum.  scale: multiplies them then.
    single_weighs_one: whether that goes for the weight of a token's only expert too.
    groups: experts lie in so many of equal size; experts of the kept_groups best ones are chosen from.
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
        """Whether weights are divided by their sum: softmax over the chosen has made it one already."""
        several = self.top_k > 1 or self.single_weighs_one
        return self.renormalize and several and self.scoring != "topk_softmax"


@dataclass(frozen=True)
class RoutingProblem:
    """The router of one layer, as a kernel sees it.  dtype: of its logits."""

    routing: Routing
    num_experts: int
    dtype: torch.dtype
    device: Device


class RoutingKernel(Protocol):
    """From logits to the experts of each token and their weights, in float32."""

    name: str

    def why_not(self, problem: RoutingProblem) -> str | None: ...

    def run(self, routing: Routing, logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """logits: [T, E], any float dtype.  bias: [E], added to the scores for choosing, not for weighing.

        Returns weights [T, K] float32 and ids [T, K] int64, the best expert first; which of several with the same
        score comes first is the kernel's choice. No id is outside the experts, whatever the logits.
        """
