"""Routers: from the logits of a token to its experts and their weights."""

# T tokens, E experts, K experts a token, N groups of experts

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pymllm.errors import ConfigError, nearest

SMALLEST_SUM = 1e-20  # added to a sum of weights that is divided by


@dataclass(frozen=True)
class TopKOutput:
    """weights: [T, K] float32.  ids: [T, K] int64.  router_logits: [T, E], as they came."""

    weights: Tensor
    ids: Tensor
    router_logits: Tensor


class TopKRouter(nn.Module):
    """Base of routers: how many experts a token gets, how logits become scores, whether weights sum to one.

    scoring_func: softmax or sigmoid over all experts, or topk_softmax: softmax over the chosen ones' logits.
    """

    scoring_funcs: tuple[str, ...] = ("softmax", "sigmoid", "topk_softmax")
    single_weighs_one = False  # whether renormalising makes the weight of a token's only expert one

    def __init__(self, top_k: int, *, renormalize: bool = True, scoring_func: str = "softmax") -> None:
        super().__init__()
        if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
            raise _bad("num_experts_per_tok", "a whole number of at least 1", top_k)
        if scoring_func not in self.scoring_funcs:
            raise _bad("scoring_func", " or ".join(self.scoring_funcs), scoring_func)
        self.top_k, self.renormalize, self.scoring_func = top_k, renormalize, scoring_func

    def forward(self, router_logits: Tensor) -> TopKOutput:
        """router_logits: [T, E], any float dtype."""
        raise NotImplementedError

    def _scores(self, router_logits: Tensor) -> Tensor:
        """[T, E] float32."""
        if self.top_k > router_logits.shape[-1]:
            raise _bad("num_experts_per_tok", f"at most the {router_logits.shape[-1]} experts", self.top_k)
        logits = router_logits.float()
        if self.scoring_func == "topk_softmax":
            return logits
        return logits.sigmoid() if self.scoring_func == "sigmoid" else logits.softmax(-1)

    def _weigh(self, scores: Tensor) -> Tensor:
        """[T, K] scores of the chosen experts as their weights."""
        if self.scoring_func == "topk_softmax":
            return scores.softmax(-1)
        if self.renormalize and (self.top_k > 1 or self.single_weighs_one):
            return scores / (scores.sum(-1, keepdim=True) + SMALLEST_SUM)
        return scores


class NaiveTopKRouter(TopKRouter):
    """The K experts with the highest scores."""

    def __init__(
        self,
        top_k: int,
        *,
        renormalize: bool = True,
        scoring_func: str = "softmax",
        routed_scaling_factor: float = 1.0,
    ) -> None:
        super().__init__(top_k, renormalize=renormalize, scoring_func=scoring_func)
        self.routed_scaling_factor = routed_scaling_factor

    def forward(self, router_logits: Tensor) -> TopKOutput:
        chosen, ids = self._scores(router_logits).topk(self.top_k, dim=-1)
        return TopKOutput(self._weigh(chosen) * self.routed_scaling_factor, ids, router_logits)


class GroupLimitedTopKRouter(TopKRouter):
    """The K best experts of the `topk_group` best of `n_group` groups (DeepSeek).

    expert_bias_getter: gives a bias [E] that ranks experts but does not weigh them; None: no bias.
    group_score: of a group, the sum of its best two ("top2", DeepSeek-V3) or its best one ("max", V2).
    routed_scaling_factor: multiplies the weights, after they were made to sum to one.
    """

    single_weighs_one = True  # as DeepSeek-V3 in transformers

    def __init__(
        self,
        top_k: int,
        *,
        num_experts: int,
        n_group: int,
        topk_group: int,
        routed_scaling_factor: float = 1.0,
        expert_bias_getter: Callable[[], Tensor | None] | None = None,
        renormalize: bool = True,
        scoring_func: str = "sigmoid",
        group_score: str = "top2",
    ) -> None:
        super().__init__(top_k, renormalize=renormalize, scoring_func=scoring_func)
        sizes = {"n_group": n_group, "topk_group": topk_group}
        for name, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise _bad(name, "a whole number of at least 1", value)
        if num_experts % n_group:
            raise _bad("n_group", f"a divisor of the {num_experts} experts", n_group)
        if topk_group > n_group:
            raise _bad("topk_group", f"at most n_group, {n_group}", topk_group)
        self.group_size = num_experts // n_group
        if top_k > topk_group * self.group_size:
            raise _bad("num_experts_per_tok", f"at most the experts of {topk_group} groups", top_k)
        if group_score not in ("top2", "max"):
            raise _bad("group_score", "top2 or max", group_score)
        self.n_group, self.topk_group, self.group_score = n_group, topk_group, group_score
        self.routed_scaling_factor, self.expert_bias_getter = routed_scaling_factor, expert_bias_getter

    def forward(self, router_logits: Tensor) -> TopKOutput:
        scores = self._scores(router_logits)
        bias = None if self.expert_bias_getter is None else self.expert_bias_getter()
        ranked = scores if bias is None else scores + bias.float()
        groups = ranked.unflatten(-1, (self.n_group, self.group_size))  # [T, N, E/N]
        best = min(2, self.group_size) if self.group_score == "top2" else 1
        kept = (
            groups.topk(best, dim=-1).values.sum(-1).topk(self.topk_group, dim=-1).indices
        )  # [T, topk_group]
        allowed = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter_(-1, kept, True)
        ranked = groups.masked_fill(~allowed.unsqueeze(-1), -torch.inf).flatten(-2)
        ids = ranked.topk(self.top_k, dim=-1).indices
        weights = self._weigh(scores.gather(-1, ids)) * self.routed_scaling_factor
        return TopKOutput(weights, ids, router_logits)


ROUTERS: dict[str, type[TopKRouter]] = {"naive": NaiveTopKRouter, "group_limited": GroupLimitedTopKRouter}


def build_topk_router(impl: str = "naive", **options: Any) -> TopKRouter:
    """The router of this name (naive, group_limited) with its options.  ConfigError for an unknown one."""
    if impl not in ROUTERS:
        raise ConfigError(
            f"there is no router {impl!r}",
            code="router",
            expected=" or ".join(ROUTERS),
            found=impl,
            fix=nearest(impl, ROUTERS),
        )
    return ROUTERS[impl](**options)


def _bad(setting: str, expected: str, found: Any) -> ConfigError:
    return ConfigError(
        f"{setting} has a value that a router cannot have",
        code="config-value",
        file="config.json",
        tensor=setting,
        expected=expected,
        found=repr(found),
    )
