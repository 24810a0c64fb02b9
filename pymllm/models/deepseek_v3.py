"""DeepSeek-V3 and R1: V2 with sigmoid routing, where a bias ranks experts but does not weigh them."""

from __future__ import annotations

from pymllm.config import ModelConfig
from pymllm.models import deepseek_v2
from pymllm.moe import TopKRouter, build_topk_router
from pymllm.moe.config import get_norm_topk_prob, get_num_experts, get_num_experts_per_tok

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
    """DeepseekV3ForCausalLM."""

    expert_bias = True

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
