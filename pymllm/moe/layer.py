"""The sparse block of a decoder layer: a router, its experts, and the experts that every token visits."""

# T tokens, K experts a token, E experts, H hidden size

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pymllm.config import current_execution
from pymllm.kernels.gated_activation import GatedActivation, activation_of
from pymllm.kernels.registry import Selection
from pymllm.layers.held import Binder
from pymllm.layers.linear import Linear
from pymllm.layers.mlp import GatedMLP
from pymllm.moe.backends import build_token_dispatcher
from pymllm.moe.dispatcher import expert_range
from pymllm.moe.experts import Experts, ExpertsSize, make_experts
from pymllm.moe.topk import GroupLimitedTopKRouter, TopKOutput, TopKRouter, build_topk_router
from pymllm.parallel import current_parallel
from pymllm.quantization.base import QuantizationConfig
from pymllm.quantization.parameters import add_weight
from pymllm.weights.spec import FLOATS, OUT, WeightSpec


class RouterLinear(Linear):
    """The layer of a router's logits, or the gate of a shared expert.

    Every rank has it whole, and only a rule that names it quantises it.
    expert_bias: whether the checkpoint has an `e_score_correction_bias` or `expert_bias` [E], which ranks experts.
    routing: the kernel that chooses experts by these logits; None: the router chooses, or nothing is chosen.
    """

    kind: ClassVar[str] = "router"
    kept = ("bias", "e_score_correction_bias")
    routing: Selection[Any] | None = None

    def __init__(
        self, in_features: int, out_features: int, *, expert_bias: bool = False, **options: Any
    ) -> None:
        super().__init__(in_features, out_features, **options)
        if expert_bias:
            name, other = "e_score_correction_bias", "expert_bias"
            spec = WeightSpec(name, torch.float32, (OUT,), accepts=FLOATS, aliases=(other,))
            add_weight(self, spec, self.shape)

    def selections(self, binder: Binder | None = None) -> Iterator[Selection[Any]]:
        """Yield the kernel of the weight, then the one that chooses experts."""
        yield from super().selections(binder)
        if self.routing is not None:
            yield self.routing

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits.  x: [T, H], any float dtype.  Returns [T, E] in the layer's own dtype."""
        return super().forward(x.to(self.params_dtype))


class SharedExpertMLP(nn.Module):
    """An expert that every token visits.  gate_prefix: the name of a gate whose sigmoid it is multiplied by, if any."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: str = "silu",
        *,
        bias: bool = False,
        gate_prefix: str | None = None,
        prefix: str = "",
        quant_config: QuantizationConfig | None = None,
    ) -> None:
        super().__init__()
        self.mlp = GatedMLP(
            hidden_size, intermediate_size, activation, bias=bias, prefix=prefix, quant_config=quant_config
        )
        self.gate = None
        if gate_prefix is not None:
            self.gate = RouterLinear(
                hidden_size, 1, bias=False, prefix=gate_prefix, quant_config=quant_config
            )

    def forward(self, x: Tensor) -> Tensor:
        """Run the expert.  x: [T, H].  Returns [T, H]."""
        y = self.mlp(x)
        return y if self.gate is None else torch.sigmoid(self.gate(x)) * y


class FusedMoE(nn.Module):
    """A block of routed experts of which every rank has all, whole.  Subclasses divide them over ranks.

    router: chooses experts by logits; None: the K best by `scoring_func`, renormalised as `renormalize` says.
    activation: what experts compute between their products, or its name in config.json.
    shared: the expert that every token visits besides; None: there is none.
    router_dtype: the dtype of the router's arithmetic; None: the activations'.
    expert_bias: see `RouterLinear`.  bias, interleaved: see `ExpertsSize`.  transposed: whether a float weight that
    holds all experts is stored with inputs before outputs.
    """

    tensor_parallel: ClassVar[bool] = False

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        router: TopKRouter | None = None,
        renormalize: bool = True,
        scoring_func: str = "softmax",
        activation: str | GatedActivation = "silu",
        shared: SharedExpertMLP | None = None,
        router_name: str = "gate",
        router_bias: bool = False,
        router_dtype: torch.dtype | None = None,
        expert_bias: bool = False,
        bias: bool = False,
        interleaved: bool = False,
        transposed: bool = False,
        prefix: str = "",
        quant_config: QuantizationConfig | None = None,
    ) -> None:
        super().__init__()
        self.parallel = current_parallel()
        self.hidden_size, self.num_experts, self.top_k = hidden_size, num_experts, top_k
        self.router = router or build_topk_router(
            "naive", top_k=top_k, renormalize=renormalize, scoring_func=scoring_func
        )
        execution = current_execution()
        as_asked = contextlib.nullcontext() if execution is None else execution
        with (
            as_asked if router_dtype is None or execution is None else replace(execution, dtype=router_dtype)
        ):
            self.gate = RouterLinear(
                hidden_size,
                num_experts,
                bias=router_bias,
                expert_bias=expert_bias,
                prefix=_join(prefix, router_name),
                quant_config=quant_config,
                params_dtype=router_dtype,
            )
        self.router.bind(num_experts, self.gate.params_dtype)
        self.gate.routing = self.router.selection
        size = ExpertsSize(
            hidden_size,
            intermediate_size,
            num_experts,
            activation if isinstance(activation, GatedActivation) else activation_of(activation),
            bias,
            interleaved,
            transposed,
        )
        self.experts = nn.ModuleList(self._make_experts(size, _join(prefix, "experts"), quant_config))
        self.shared = shared
        if expert_bias and isinstance(self.router, GroupLimitedTopKRouter):
            self.router.expert_bias_getter = lambda: self.gate.e_score_correction_bias  # type: ignore[assignment]

    def experts_held(self) -> range:
        """Return the experts that this rank has, whole or a share of each."""
        return range(self.num_experts)

    def _make_experts(
        self, size: ExpertsSize, prefix: str, quant_config: QuantizationConfig | None
    ) -> list[Experts]:
        held = self.experts_held()
        return make_experts(size, prefix, held, quant_config, tensor_parallel=self.tensor_parallel)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Run the block on x [*, H].  Returns the same shape, and the router's logits [T, E]."""
        tokens = x.reshape(-1, self.hidden_size)
        logits = self.gate(tokens)
        y = self.run_experts(tokens, self.router(logits))
        if self.shared is not None:
            y = y + self.shared(tokens)
        return y.view(x.shape), logits

    def run_experts(self, x: Tensor, topk: TopKOutput) -> Tensor:
        """Run the tokens' experts on all ranks.  x: [T, H], the same on every rank.  Returns [T, H], on every rank."""
        return self.run_held(x, topk.ids, topk.weights)

    def run_held(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Sum up, weighted, what those of the tokens' experts give that this rank has.

        x: [T, H]; ids, weights: [T, K], other experts' too.  Returns [T, H].
        """
        first, *others = self.experts
        y = first(x, ids, weights)
        for group in others:
            y = y + group(x, ids, weights)
        return y


SparseMoEBlock = FusedMoE


class NaiveFusedMoE(FusedMoE):
    """The reference: every rank runs all experts, by the reference kernel."""

    def _make_experts(
        self, size: ExpertsSize, prefix: str, quant_config: QuantizationConfig | None
    ) -> list[Experts]:
        execution = current_execution()
        if execution is None:
            return super()._make_experts(size, prefix, quant_config)
        with replace(execution, kernels=(*execution.kernels, ("experts", "reference"))):
            return super()._make_experts(size, prefix, quant_config)


class TPFusedMoE(FusedMoE):
    """The block where every rank has a share of each expert's intermediate features; the ranks' sums are added up."""

    tensor_parallel = True

    def run_experts(self, x: Tensor, topk: TopKOutput) -> Tensor:
        return self.parallel.all_reduce(super().run_experts(x, topk))


class EPFusedMoE(FusedMoE):
    """The block where every rank has some of the experts, whole.

    As tensor-parallel attention gives all ranks all tokens, each rank takes its share of them and sends these to the
    ranks of their experts; then the answers are gathered again. A rank may have no tokens, or no experts.
    """

    def __init__(self, *sizes: int, dispatcher: str = "naive", **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.dispatcher = build_token_dispatcher(dispatcher, self.parallel, self.num_experts)

    def experts_held(self) -> range:
        return expert_range(self.num_experts, self.parallel.rank, self.parallel.size)

    def run_experts(self, x: Tensor, topk: TopKOutput) -> Tensor:
        tokens, size = x.shape[0], self.parallel.size
        share = -(-tokens // size)
        mine = slice(min(self.parallel.rank * share, tokens), min((self.parallel.rank + 1) * share, tokens))
        y = self.run_own(x[mine], TopKOutput(topk.weights[mine], topk.ids[mine], topk.router_logits[mine]))
        if size == 1:
            return y
        padded = torch.nn.functional.pad(y, (0, 0, 0, share - y.shape[0]))
        return self.parallel.all_gather(padded, dim=0)[:tokens]

    def run_own(self, x: Tensor, topk: TopKOutput) -> Tensor:
        """Run the experts of this rank's own tokens, wherever they are.  Every rank must call it.

        x: [T, H], perhaps no tokens.  Returns [T, H].
        """
        try:
            received = self.dispatcher.dispatch(x, topk)
            ids, weights = received.recv_local_expert_ids, received.recv_weights
            if ids.ndim == 1:
                ids, weights = ids.unsqueeze(-1), weights.unsqueeze(-1)
            indexes = torch.where(ids < 0, -1, ids + self.experts_held().start)
            return self.dispatcher.combine(self.run_held(received.recv_hidden_states, indexes, weights))
        except BaseException:
            # Out of memory, for example: the next request must find the dispatcher at its beginning.
            self.dispatcher.reset()
            raise


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
