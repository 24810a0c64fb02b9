"""Qwen3-MoE: Qwen3 with routed experts in place of the MLP."""

from __future__ import annotations

from torch import nn

from pymllm.models import qwen3
from pymllm.moe import build_mlp_or_moe, build_moe_block
from pymllm.quantization.base import QuantizationConfig
from pymllm.weights.gguf_architecture import (
    ATTENTION_MODULES,
    EXPERT_CONSTANTS,
    EXPERT_SETTINGS,
    GGUFArchitecture,
    expert_modules,
)

DEFAULTS = {
    **qwen3.DEFAULTS,
    "head_dim": None,  # hidden_size / num_attention_heads, unlike Qwen3's
    "num_key_value_heads": 4,
    "num_local_experts": 128,  # or num_experts, which comes first where a config has it
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
}
GGUF = {
    "qwen3moe": GGUFArchitecture(
        "qwen3_moe",
        ATTENTION_MODULES | expert_modules(),
        settings=EXPERT_SETTINGS,
        constants=EXPERT_CONSTANTS | {"expert_weights_norm": (True,)},
        fixed={"norm_topk_prob": True, "decoder_sparse_step": 1},
    )
}


class Model(qwen3.Model):
    """Qwen3MoeForCausalLM."""

    def make_mlp(self, index: int, prefix: str, quant_config: QuantizationConfig | None) -> nn.Module:
        return build_mlp_or_moe(
            self.config,
            index,
            lambda: super(Model, self).make_mlp(index, prefix, quant_config),
            lambda: build_moe_block("auto", self.config, prefix=prefix, quant_config=quant_config),
        )
