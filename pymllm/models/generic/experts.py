"""Our experts in the place of a module of transformers' that stacks the weights of all experts of a layer."""

# T tokens, K experts a token, H hidden size, I intermediate size

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pymllm.kernels.gated_activation import GatedActivation
from pymllm.models.generic.classes import on_cpu
from pymllm.models.generic.probe import probing
from pymllm.moe.dispatcher import expert_range
from pymllm.moe.experts import STACKED, ExpertsSize, make_experts
from pymllm.parallel import current_parallel
from pymllm.quantization.base import QuantizationConfig


class RoutedExperts(nn.Module):
    """The experts of a layer, called as transformers calls its own."""

    def __init__(self, size: ExpertsSize, name: str, quant_config: QuantizationConfig | None) -> None:
        super().__init__()
        self.parallel = parallel = current_parallel()
        ids = range(size.num_experts)
        if parallel.expert_parallel:
            ids = expert_range(size.num_experts, parallel.rank, parallel.size)
        shared = not parallel.expert_parallel
        self.groups = nn.ModuleList(make_experts(size, name, ids, quant_config, tensor_parallel=shared))
        self.num_experts = size.num_experts

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Run the tokens' experts.  hidden_states: [*, H]; top_k_index, top_k_weights: [T, K].  Returns [*, H]."""
        if probing() is not None:
            return torch.empty_like(hidden_states)
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        first, *others = self.groups
        weights = top_k_weights.float()
        y = first(tokens, top_k_index, weights)
        for group in others:
            y = y + group(tokens, top_k_index, weights)
        y = self.parallel.all_reduce(y)
        return y.view(hidden_states.shape).to(hidden_states.dtype)


def find_experts(module: Any) -> ExpertsSize | None:
    """Tell the size and layout of a module that stacks experts as transformers' experts interface has them.

    None: it is no such module, or computes between its products what our experts do not, as a trial shows.
    """
    up, down = (getattr(module, name, None) for name in STACKED)
    if not isinstance(up, nn.Parameter) or not isinstance(down, nn.Parameter):
        return None
    stacked = up.ndim == down.ndim == 3
    if not stacked or not hasattr(module, "is_transposed") or getattr(module, "has_post_expert_norm", False):
        return None
    transposed, count = bool(module.is_transposed), down.shape[0]
    hidden, inner = (down.shape[2], down.shape[1]) if transposed else (down.shape[1], down.shape[2])
    interleaved = not module.is_concatenated
    activation = find_activation(module, interleaved)
    if activation is None or not module.has_gate:
        return None
    return ExpertsSize(hidden, inner, count, activation, bool(module.has_bias), interleaved, transposed)


@on_cpu
def find_activation(module: Any, interleaved: bool) -> GatedActivation | None:
    """Find which of our gated activations a module of experts computes, by a trial.  None: none of them."""
    gate_up = torch.linspace(-9, 9, 64).view(2, 32).roll(5, 1)
    gate, up = gate_up.chunk(2, dim=-1)
    given = torch.stack((gate, up), dim=-1).flatten(-2) if interleaved else gate_up
    alpha, limit = getattr(module, "alpha", 1.0), getattr(module, "limit", float("inf"))
    known = [GatedActivation("silu"), GatedActivation("gelu_tanh")]
    if isinstance(alpha, (int, float)) and isinstance(limit, (int, float)):
        known.append(GatedActivation("swiglu", float(alpha), float(limit)))
    try:
        expected = module._apply_gate(given)
    except Exception:
        return None
    return next((one for one in known if torch.allclose(one(gate_up), expected, rtol=1e-6, atol=1e-6)), None)
