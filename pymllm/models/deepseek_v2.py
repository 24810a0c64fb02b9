"""DeepSeek-V2: latent attention; the first layers dense, then routed experts in groups and shared ones."""

from __future__ import annotations

import torch
from torch import nn

from pymllm.attention.latent_attention import LatentAttention
from pymllm.config import ModelConfig
from pymllm.models import llama
from pymllm.moe import SharedExpertMLP, TopKRouter, build_mlp_or_moe, build_moe_block, build_topk_router
from pymllm.moe.config import get_num_experts, get_num_experts_per_tok
from pymllm.quantization.base import QuantizationConfig

DEFAULTS = {
    **llama.DEFAULTS,
    "num_local_experts": 64,  # or n_routed_experts, which comes first where a config has it
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1407,
    "first_k_dense_replace": 0,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rope_interleave": True,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
}


class Model(llama.Model):
    """DeepseekV2ForCausalLM."""

    # True: a bias ranks the router's experts.
    expert_bias = False

    def make_attention(self, index: int, prefix: str, quant_config: QuantizationConfig | None) -> nn.Module:
        return LatentAttention(
            self.config, prefix=prefix, quant_config=quant_config, interleaved=self.config.rope_interleave
        )

    def make_mlp(self, index: int, prefix: str, quant_config: QuantizationConfig | None) -> nn.Module:
        return build_mlp_or_moe(
            self.config,
            index,
            lambda: super(Model, self).make_mlp(index, prefix, quant_config),
            lambda: self.make_moe(prefix, quant_config),
        )

    def make_router(self, config: ModelConfig) -> TopKRouter:
        """Make the router: softmax, not renormalised; among the best groups, by each group's best expert."""
        top_k, scale = get_num_experts_per_tok(config), config.routed_scaling_factor
        if config.topk_method == "greedy":
            return build_topk_router("naive", top_k=top_k, renormalize=False, routed_scaling_factor=scale)
        return build_topk_router(
            "group_limited",
            top_k=top_k,
            num_experts=get_num_experts(config),
            n_group=config.n_group,
            topk_group=config.topk_group,
            routed_scaling_factor=scale,
            renormalize=False,
            scoring_func="softmax",
            group_score="max",
        )

    def make_moe(self, prefix: str, quant_config: QuantizationConfig | None) -> nn.Module:
        config = self.config
        shared = None
        if config.get("n_shared_experts"):
            shared = SharedExpertMLP(
                config.size("hidden_size"),
                config.size("moe_intermediate_size") * config.size("n_shared_experts"),
                config.hidden_act,
                bias=config.mlp_bias,
                prefix=f"{prefix}.shared_experts",
                quant_config=quant_config,
            )
        return build_moe_block(
            "auto",
            config,
            router=self.make_router(config),
            shared=shared,
            router_dtype=torch.float32,
            expert_bias=self.expert_bias,
            prefix=prefix,
            quant_config=quant_config,
        )
