"""Llama: grouped-query attention, rotary positions, SiLU-gated MLP."""

from __future__ import annotations

from torch import nn

from pymllm.attention.self_attention import SelfAttention
from pymllm.layers.mlp import GatedMLP
from pymllm.models.causal_lm import CausalLM
from pymllm.quantization.base import QuantizationConfig
from pymllm.weights.gguf_checkpoint import GGUFArchitecture

DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "mlp_bias": False,
}
GGUF = {"llama": GGUFArchitecture("llama", interleaved=True)}


class Model(CausalLM):
    """LlamaForCausalLM."""

    def make_attention(self, index: int, prefix: str, quant_config: QuantizationConfig | None) -> nn.Module:
        bias = self.config.attention_bias
        return SelfAttention(
            self.config, index, prefix=prefix, quant_config=quant_config, qkv_bias=bias, output_bias=bias
        )

    def make_mlp(self, index: int, prefix: str, quant_config: QuantizationConfig | None) -> nn.Module:
        return GatedMLP(
            self.config.size("hidden_size"),
            self.config.size("intermediate_size"),
            self.config.hidden_act,
            bias=self.config.mlp_bias,
            prefix=prefix,
            quant_config=quant_config,
        )
