"""Llama: grouped-query attention, rotary positions, SiLU-gated MLP."""

from __future__ import annotations

from typing import Any

from pymllm.models.causal_lm import CausalLM
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

    def mlp_options(self) -> dict[str, Any]:
        return {"activation": self.config.hidden_act, "bias": self.config.mlp_bias}
