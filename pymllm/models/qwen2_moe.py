"""Qwen2-MoE and Qwen1.5-MoE: Qwen2 with routed experts, and a shared one behind a gate of its own."""

from __future__ import annotations

from typing import Any

from torch import nn

from pymllm.config import ModelConfig
from pymllm.models import qwen2
from pymllm.moe import SharedExpertMLP, build_mlp_or_moe, build_moe_block
from pymllm.quantization.base import QuantizationConfig
from pymllm.weights.gguf_architecture import (
    ATTENTION_MODULES,
    EXPERT_CONSTANTS,
    EXPERT_SETTINGS,
    GGUFArchitecture,
    expert_modules,
)

DEFAULTS = {
    **qwen2.DEFAULTS,
    "num_key_value_heads": 16,
    "num_local_experts": 60,  # or num_experts, which comes first where a config has it
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "qkv_bias": True,
}
SHARED = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
GGUF = {
    "qwen2moe": GGUFArchitecture(
        "qwen2_moe",
        ATTENTION_MODULES | expert_modules() | SHARED,
        settings=EXPERT_SETTINGS | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
        constants=EXPERT_CONSTANTS | {"expert_weights_norm": (False,)},
        fixed={"norm_topk_prob": False, "decoder_sparse_step": 1},
    )
}


class Model(qwen2.Model):
    """Qwen2MoeForCausalLM."""

    def attention_options(self) -> dict[str, Any]:
        return {"qkv_bias": self.config.qkv_bias}

    def make_mlp(self, index: int, prefix: str, quant_config: QuantizationConfig | None) -> nn.Module:
        return build_mlp_or_moe(
            self.config,
            index,
            lambda: super(Model, self).make_mlp(index, prefix, quant_config),
            lambda: make_shared_moe(self.config, prefix, quant_config),
        )


def make_shared_moe(config: ModelConfig, prefix: str, quant_config: QuantizationConfig | None) -> nn.Module:
    """Make the block of routed experts and a shared one, whose modules are called `prefix`.*."""
    shared = SharedExpertMLP(
        config.size("hidden_size"),
        config.size("shared_expert_intermediate_size"),
        config.hidden_act,
        gate_prefix=f"{prefix}.shared_expert_gate",
        prefix=f"{prefix}.shared_expert",
        quant_config=quant_config,
    )
    return build_moe_block("auto", config, shared=shared, prefix=prefix, quant_config=quant_config)
