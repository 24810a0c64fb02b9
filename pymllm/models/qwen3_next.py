"""Qwen3-Next: the layers of Qwen3.5 with other projections, and routed experts beside a shared one."""

from __future__ import annotations

from torch import nn

from pymllm.layers.gated_delta_net import GroupedGatedDeltaNet
from pymllm.models import qwen2_moe, qwen3_5_text
from pymllm.moe import build_mlp_or_moe
from pymllm.quantization.base import QuantizationConfig

DEFAULTS = {
    **qwen3_5_text.DEFAULTS,
    "num_key_value_heads": 2,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
}


class Model(qwen3_5_text.Model):
    """Qwen3NextForCausalLM."""

    delta_net = GroupedGatedDeltaNet

    def make_mlp(self, index: int, prefix: str, quant_config: QuantizationConfig | None) -> nn.Module:
        return build_mlp_or_moe(
            self.config,
            index,
            lambda: super(Model, self).make_mlp(index, prefix, quant_config),
            lambda: qwen2_moe.make_shared_moe(self.config, prefix, quant_config),
        )
