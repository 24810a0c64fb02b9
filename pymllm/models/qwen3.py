"""Qwen3: Llama with a norm on each head of q and k."""

from __future__ import annotations

from torch import nn

from pymllm.attention.self_attention import SelfAttention
from pymllm.layers.layernorm import RMSNorm
from pymllm.models import llama
from pymllm.quantization.base import QuantizationConfig
from pymllm.weights.gguf_checkpoint import GGUFArchitecture

DEFAULTS = {
    **llama.DEFAULTS,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
GGUF = {"qwen3": GGUFArchitecture("qwen3")}


class Model(llama.Model):
    """Qwen3ForCausalLM."""

    def make_attention(self, index: int, prefix: str, quant_config: QuantizationConfig | None) -> nn.Module:
        bias = self.config.attention_bias
        return SelfAttention(
            self.config,
            index,
            prefix=prefix,
            quant_config=quant_config,
            qkv_bias=bias,
            output_bias=bias,
            qk_norm=RMSNorm,
        )
