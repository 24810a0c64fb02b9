"""Mixtral: Mistral with routed experts in place of every MLP."""

from __future__ import annotations

from torch import nn

from pymllm.models import llama
from pymllm.moe import build_moe_block
from pymllm.quantization.base import QuantizationConfig

DEFAULTS = {
    **llama.DEFAULTS,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rope_theta": 1e6,
    "sliding_window": None,
}


class Model(llama.Model):
    """MixtralForCausalLM.  Checkpoints call the block block_sparse_moe, and an expert's products w1, w3 and w2."""

    def make_mlp(self, index: int, prefix: str, quant_config: QuantizationConfig | None) -> nn.Module:
        if quant_config is None or f"{prefix}.gate" not in quant_config.stored_modules:
            prefix = prefix.removesuffix("mlp") + "block_sparse_moe"
        return build_moe_block("auto", self.config, prefix=prefix, quant_config=quant_config)
