"""Llama: grouped-query attention, rotary positions, SiLU-gated MLP."""

from __future__ import annotations

from typing import Any

from pymllm.models.causal_lm import CausalLM
from pymllm.weights.gguf_architecture import (
    ATTENTION_MODULES,
    EXPERT_CONSTANTS,
    EXPERT_SETTINGS,
    GGUFArchitecture,
    expert_modules,
)

DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "mlp_bias": False,
}
# Files of Mistral and Mixtral have this architecture, too.
GGUF = {
    "llama": GGUFArchitecture(
        "llama",
        interleaved=True,
        sliding=0,
        windowed_type="mistral",
        with_experts=GGUFArchitecture(
            "mixtral",
            ATTENTION_MODULES | expert_modules("block_sparse_moe", names=("w1", "w3", "w2")),
            interleaved=True,
            settings=EXPERT_SETTINGS
            | {"expert_count": "num_local_experts", "expert_feed_forward_length": "intermediate_size"},
            constants=EXPERT_CONSTANTS | {"expert_weights_norm": (True,)},
            sliding=0,
        ),
    )
}


class Model(CausalLM):
    """LlamaForCausalLM."""

    def mlp_options(self) -> dict[str, Any]:
        return {"activation": self.config.hidden_act, "bias": self.config.mlp_bias}
