"""DeepSeek-V3 and R1: V2 with sigmoid routing, where a bias ranks experts but does not weigh them."""

from __future__ import annotations

from pymllm.config import ModelConfig
from pymllm.models import deepseek_v2
from pymllm.moe import TopKRouter, build_topk_router
from pymllm.moe.config import get_norm_topk_prob, get_num_experts, get_num_experts_per_tok
from pymllm.quantization.base import QuantizationConfig

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

    def __init__(self, config: ModelConfig, quant_config: QuantizationConfig | None = None) -> None:
        super().__init__(config, quant_config)
        first, count = config.size("num_hidden_layers"), config.get("num_nextn_predict_layers", 1)
        further = "|".join(str(first + index) for index in range(count or 0))
        reason = "a layer that predicts further tokens, which is not run"
        self.skipped_tensors = {**self.skipped_tensors, rf"model\.layers\.(?:{further})\..*": reason}  # type: ignore[misc]

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
