"""DeepSeek-V3 and R1: V2 with sigmoid routing, where a bias ranks experts but does not weigh them."""

from __future__ import annotations

from collections.abc import Mapping

from pymllm.config import ModelConfig
from pymllm.models import deepseek_v2
from pymllm.moe import TopKRouter, build_topk_router
from pymllm.moe.config import get_norm_topk_prob, get_num_experts, get_num_experts_per_tok
from pymllm.quantization.base import StoredTensor
from pymllm.weights.report import Skip

DEFAULTS = {
    **deepseek_v2.DEFAULTS,
    "max_position_embeddings": 4096,
    "num_local_experts": 256,  # or n_routed_experts, which comes first where a config has it
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}


class Model(deepseek_v2.Model):
    """DeepseekV3ForCausalLM.  The layers that predict further tokens are not run."""

    expert_bias = True

    def skip_reason(self, tensor: str, stored: Mapping[str, StoredTensor]) -> Skip | str | None:
        # A layer that predicts further tokens has eh_proj; one without is a layer that the config does not count.
        first, count = self.config.size("num_hidden_layers"), self.config.get("num_nextn_predict_layers", 1)
        for index in range(first, first + (count or 0)):
            prefix = f"model.layers.{index}."
            if tensor.startswith(prefix) and any(name.startswith(f"{prefix}eh_proj.") for name in stored):
                return "a layer that predicts further tokens, which is not run"
        return super().skip_reason(tensor, stored)

    def make_router(self, config: ModelConfig) -> TopKRouter:
        return build_topk_router(
            "group_limited",
            top_k=get_num_experts_per_tok(config),
            num_experts=get_num_experts(config),
            n_group=config.n_group,
            topk_group=config.topk_group,
            routed_scaling_factor=config.routed_scaling_factor,
            renormalize=get_norm_topk_prob(config),
        )
