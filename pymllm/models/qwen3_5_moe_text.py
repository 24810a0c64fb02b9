"""Qwen3.5-MoE: Qwen3.5 with routed experts in place of every MLP, and a shared one behind a gate of its own."""

from __future__ import annotations

from torch import nn

from pymllm.models import qwen2_moe, qwen3_5_text
from pymllm.quantization.base import QuantizationConfig

DEFAULTS = {
    **qwen3_5_text.DEFAULTS,
    "num_key_value_heads": 2,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "norm_topk_prob": True,
}
RENAMED = qwen3_5_text.RENAMED


class Model(qwen3_5_text.Model):
    """Qwen3_5MoeForCausalLM."""

    def make_mlp(self, index: int, prefix: str, quant_config: QuantizationConfig | None) -> nn.Module:
        return qwen2_moe.make_shared_moe(self.config, prefix, quant_config)
