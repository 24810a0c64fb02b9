"""Qwen3.5: gated delta nets in three of four layers, gated attention in the fourth, norms of 1 + their weight."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from pymllm.attention.gated_attention import GatedAttention
from pymllm.config import LINEAR
from pymllm.layers.gated_delta_net import GatedDeltaNet
from pymllm.layers.layernorm import GemmaRMSNorm
from pymllm.models.causal_lm import CausalLM, DecoderLayer
from pymllm.quantization.base import QuantizationConfig

DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "attention_bias": False,
    "head_dim": 256,
    "num_key_value_heads": 4,
    "partial_rotary_factor": 0.25,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
# Fine-tuned language models keep the name that the wrapper had for theirs.
RENAMED = {r"model\.language_model\.(.*)": r"model.\1"}


class HybridLayer(DecoderLayer):
    """A layer with a gated delta net, `linear_attn`, or with attention."""

    read_by: ClassVar[dict[str, str]] = {**DecoderLayer.read_by, "linear_attn": "input_layernorm"}

    @staticmethod
    def mixer_name_of(module: nn.Module) -> str:
        return "linear_attn" if isinstance(module, GatedDeltaNet) else "self_attn"

    @property
    def mixer(self) -> Any:
        return self.linear_attn if hasattr(self, "linear_attn") else self.self_attn


class Model(CausalLM):
    """Qwen3_5ForCausalLM.  delta_net: the class of the layers without attention."""

    layer = HybridLayer
    attention = GatedAttention
    norm = GemmaRMSNorm
    delta_net: ClassVar[type[GatedDeltaNet]] = GatedDeltaNet

    def attention_options(self) -> dict[str, Any]:
        return {**super().attention_options(), "qk_norm": GemmaRMSNorm}

    def make_attention(self, index: int, prefix: str, quant_config: QuantizationConfig | None) -> nn.Module:
        if self.config.attention_kind_of(index) != LINEAR:
            return super().make_attention(index, prefix, quant_config)
        place = prefix.rpartition(".")[0]
        return self.delta_net(self.config, prefix=f"{place}.linear_attn", quant_config=quant_config)
