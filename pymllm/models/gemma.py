"""Gemma: Llama with scaled embeddings, norms that multiply by 1 + their weight, and a GELU-gated MLP."""

from __future__ import annotations

from torch import nn

from pymllm.attention.self_attention import SelfAttention
from pymllm.config import ModelConfig
from pymllm.errors import ConfigError
from pymllm.layers.layernorm import GemmaRMSNorm
from pymllm.layers.mlp import GatedMLP
from pymllm.models.causal_lm import CausalLM
from pymllm.quantization.base import QuantizationConfig

DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
    "head_dim": 256,
    "num_key_value_heads": 16,
    "max_position_embeddings": 8192,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "use_bidirectional_attention": False,
}


class Model(CausalLM):
    """GemmaForCausalLM."""

    norm = GemmaRMSNorm

    def __init__(self, config: ModelConfig, quant_config: QuantizationConfig | None = None) -> None:
        if config.use_bidirectional_attention:
            raise ConfigError(
                "attention to later tokens is not for generating text",
                code="config-value",
                file="config.json",
                tensor="use_bidirectional_attention",
                expected="false",
                found=repr(config.use_bidirectional_attention),
            )
        self.embedding_scale = config.size("hidden_size") ** 0.5
        super().__init__(config, quant_config)

    def make_attention(self, index: int, prefix: str, quant_config: QuantizationConfig | None) -> nn.Module:
        bias = self.config.attention_bias
        return SelfAttention(
            self.config, index, prefix=prefix, quant_config=quant_config, qkv_bias=bias, output_bias=bias
        )

    def make_mlp(self, index: int, prefix: str, quant_config: QuantizationConfig | None) -> nn.Module:
        # "gelu" is what early files have for the tanh approximation.
        activation = "gelu_pytorch_tanh" if self.config.hidden_act == "gelu" else self.config.hidden_act
        return GatedMLP(
            self.config.size("hidden_size"),
            self.config.size("intermediate_size"),
            activation,
            prefix=prefix,
            quant_config=quant_config,
        )
