"""gpt-oss: attention sinks, every other layer a sliding window, experts with biases and a clamped SwiGLU.

Experts are stored all in one tensor, gate and up in turns: floats with inputs before outputs, or MXFP4.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from pymllm.config import ModelConfig
from pymllm.kernels.gated_activation import GatedActivation
from pymllm.models.causal_lm import CausalLM
from pymllm.moe import build_moe_block, build_topk_router
from pymllm.moe.config import get_num_experts_per_tok
from pymllm.quantization.base import QuantizationConfig
from pymllm.weights.gguf_architecture import (
    ATTENTION_MODULES,
    EXPERT_CONSTANTS,
    EXPERT_SETTINGS,
    GGUFArchitecture,
    expert_modules,
)

DEFAULTS = {
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "head_dim": 64,
    "num_key_value_heads": 8,
    "sliding_window": 128,
    "attention_bias": True,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "rope_theta": 150000.0,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}


def keep_fractions(config: dict[str, Any]) -> None:
    """Keep the bounds of yarn's ramp as they are computed: the model does not round them, and no file says so."""
    rope = config["rope_parameters"]
    for settings in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if settings.get("rope_type") == "yarn":
            settings["truncate"] = False


GGUF = {
    "gpt-oss": GGUFArchitecture(
        "gpt_oss",
        {name: to for name, to in ATTENTION_MODULES.items() if name != "ffn_norm"}
        | expert_modules(router="router")
        | {"post_attention_norm": "post_attention_layernorm", "attn_sinks.weight": "self_attn.sinks"},
        settings=EXPERT_SETTINGS
        | {"expert_count": "num_local_experts", "expert_feed_forward_length": "intermediate_size"},
        constants=EXPERT_CONSTANTS | {"expert_gating_func": (0, 3)},  # softmax of the chosen
        required=("attention.sliding_window",),
        sliding=2,
        finish=keep_fractions,
    )
}


class Model(CausalLM):
    """GptOssForCausalLM."""

    def __init__(self, config: ModelConfig, quant_config: QuantizationConfig | None = None) -> None:
        kinds = ("sliding_attention", "full_attention")
        layers = range(config.size("num_hidden_layers"))
        config.defaults["layer_types"] = [kinds[index % 2] for index in layers]
        super().__init__(config, quant_config)

    def attention_options(self) -> dict[str, Any]:
        return {**super().attention_options(), "sinks": True}

    def make_mlp(self, index: int, prefix: str, quant_config: QuantizationConfig | None) -> nn.Module:
        top_k = get_num_experts_per_tok(self.config)
        return build_moe_block(
            "auto",
            self.config,
            router=build_topk_router("naive", top_k=top_k, scoring_func="topk_softmax"),
            router_name="router",
            router_bias=True,
            activation=GatedActivation("swiglu", self.config.swiglu_alpha, self.config.swiglu_limit),
            bias=True,
            interleaved=True,
            transposed=True,
            prefix=prefix,
            quant_config=quant_config,
        )
