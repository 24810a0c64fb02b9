"""Phi-3 and Phi-4-mini: Llama whose checkpoint has q, k and v in one tensor, and gate and up in another."""

from __future__ import annotations

from torch import nn

from pymllm.attention.self_attention import SelfAttention
from pymllm.layers.mlp import GatedMLP
from pymllm.models.causal_lm import CausalLM
from pymllm.quantization.base import QuantizationConfig

DEFAULTS = {
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "sliding_window": None,
}


class Model(CausalLM):
    """Phi3ForCausalLM."""

    @property
    def restart_length(self) -> int | None:  # type: ignore[override]
        """Past the trained length, LongRoPE has other frequencies for all positions."""
        rope = self.config.rope_parameters
        return rope.scaling["original_max_position_embeddings"] + 1 if rope.rope_type == "longrope" else None

    def make_attention(self, index: int, prefix: str, quant_config: QuantizationConfig | None) -> nn.Module:
        return SelfAttention(
            self.config, index, prefix=prefix, quant_config=quant_config, part_names=("qkv_proj",)
        )

    def make_mlp(self, index: int, prefix: str, quant_config: QuantizationConfig | None) -> nn.Module:
        return GatedMLP(
            self.config.size("hidden_size"),
            self.config.size("intermediate_size"),
            self.config.hidden_act,
            part_names=("gate_up_proj",),
            prefix=prefix,
            quant_config=quant_config,
        )
