"""Routers: they turn the logits of a token into its experts and their weights.

A router has a rule (`kernels/routing.py`). When a block of a model takes the router, it chooses the kernel that
computes the rule; a router on its own uses torch's.
"""

# T tokens, E experts, K experts a token

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pymllm.config import current_execution
from pymllm.errors import ConfigError, counted, unknown_name
from pymllm.kernels.aten.routing import TorchRouting
from pymllm.kernels.hardware import probe_device
from pymllm.kernels.registry import Selection, select
from pymllm.kernels.routing import Routing, RoutingKernel, RoutingProblem

ANY = TorchRouting()


@dataclass(frozen=True)
class TopKOutput:
    """The experts of tokens.  weights: [T, K] float32.  ids: [T, K] int64.  router_logits: [T, E], as they came."""

    weights: Tensor
    ids: Tensor
    router_logits: Tensor


class TopKRouter(nn.Module):
    """The base of routers.

    top_k: the number of experts that a token gets.  renormalize: whether its weights are made to sum to one.
    scoring_func: softmax or sigmoid over all experts, or topk_softmax: softmax over the logits of the chosen ones.
    """

    scoring_funcs: tuple[str, ...] = ("softmax", "sigmoid", "topk_softmax")

    def __init__(self, top_k: int, *, renormalize: bool = True, scoring_func: str = "softmax") -> None:
        super().__init__()
        if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
            raise _bad("num_experts_per_tok", "a whole number of at least 1", top_k)
        if scoring_func not in self.scoring_funcs:
            raise _bad("scoring_func", " or ".join(self.scoring_funcs), scoring_func)
        self.top_k, self.renormalize, self.scoring_func = top_k, renormalize, scoring_func
        self.selection: Selection[RoutingKernel] | None = None

    @property
    def routing(self) -> Routing | None:
        """The rule that kernels compute; None: the router computes a rule of its own, in `forward`."""
        return None

    def bind(self, num_experts: int, dtype: torch.dtype) -> None:
        """Choose the kernel for logits [T, num_experts] of this dtype.  Do nothing outside of an execution."""
        execution = current_execution()
        if execution is not None and self.routing is not None:
            problem = RoutingProblem(self.routing, num_experts, dtype, probe_device(execution.device))
            self.selection = select("routing", problem, execution.forced_kernel("routing"))

    def forward(self, router_logits: Tensor) -> TopKOutput:
        """Choose experts.  router_logits: [T, E], any float dtype."""
        raise NotImplementedError

    def _route(self, routing: Routing, router_logits: Tensor, bias: Tensor | None = None) -> TopKOutput:
        if self.top_k > router_logits.shape[-1]:
            raise _bad("num_experts_per_tok", f"at most the {router_logits.shape[-1]} experts", self.top_k)
        kernel = ANY if self.selection is None else self.selection.kernel
        weights, ids = kernel.run(routing, router_logits, bias)
        return TopKOutput(weights, ids, router_logits)


class NaiveTopKRouter(TopKRouter):
    """The router that takes the K experts with the highest scores.  routed_scaling_factor: multiplies the weights."""

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

    @property
    def routing(self) -> Routing:
        return Routing(
            top_k=self.top_k,
            scoring=self.scoring_func,  # type: ignore[arg-type]  # checked when it was made
            renormalize=self.renormalize,
            scale=self.routed_scaling_factor,
        )

    def forward(self, router_logits: Tensor) -> TopKOutput:
        return self._route(self.routing, router_logits)


class GroupLimitedTopKRouter(TopKRouter):
    """The router that takes the K best experts of the `topk_group` best of `n_group` groups (DeepSeek).

    expert_bias_getter: returns a bias [E] that ranks experts but does not weigh them; None: there is none.
    group_score: the score of a group: the sum of its best two ("top2", DeepSeek-V3) or its best one ("max", V2).
    routed_scaling_factor: multiplies the weights, after they were made to sum to one.
    """

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
            raise _bad("n_group", f"a divisor of the {counted(num_experts, 'expert')}", n_group)
        if topk_group > n_group:
            raise _bad("topk_group", f"at most n_group, {n_group}", topk_group)
        self.group_size = num_experts // n_group
        if top_k > topk_group * self.group_size:
            raise _bad("num_experts_per_tok", f"at most the experts of {counted(topk_group, 'group')}", top_k)
        if group_score not in ("top2", "max"):
            raise _bad("group_score", "top2 or max", group_score)
        self.n_group, self.topk_group, self.group_score = n_group, topk_group, group_score
        self.routed_scaling_factor, self.expert_bias_getter = routed_scaling_factor, expert_bias_getter

    @property
    def routing(self) -> Routing:
        return Routing(
            top_k=self.top_k,
            scoring=self.scoring_func,  # type: ignore[arg-type]  # checked when it was made
            renormalize=self.renormalize,
            single_weighs_one=True,  # as DeepSeek-V3 in transformers
            scale=self.routed_scaling_factor,
            groups=self.n_group,
            kept_groups=self.topk_group,
            group_best=min(2, self.group_size) if self.group_score == "top2" else 1,
        )

    def forward(self, router_logits: Tensor) -> TopKOutput:
        if router_logits.shape[-1] != self.n_group * self.group_size:
            found = f"logits of {router_logits.shape[-1]}"
            raise _bad("num_experts", f"{self.n_group * self.group_size}, as the router was made for", found)
        bias = None if self.expert_bias_getter is None else self.expert_bias_getter()
        return self._route(self.routing, router_logits, bias)


ROUTERS: dict[str, type[TopKRouter]] = {"naive": NaiveTopKRouter, "group_limited": GroupLimitedTopKRouter}


def build_topk_router(impl: str = "naive", **options: Any) -> TopKRouter:
    """Make the router of this name (naive, group_limited) with its options.  ConfigError for an unknown name."""
    if impl not in ROUTERS:
        raise unknown_name("router", impl, ROUTERS, code="router")
    return ROUTERS[impl](**options)


def _bad(setting: str, expected: str, found: Any) -> ConfigError:
    return ConfigError(
        f"the router cannot take this value of {setting}",
        code="config-value",
        file="config.json",
        tensor=setting,
        expected=expected,
        found=repr(found),
    )
