"""Phi-3 and Phi-4-mini: Llama whose checkpoint has q, k and v in one tensor, and gate and up in another."""

from __future__ import annotations

from typing import Any

from pymllm.models.causal_lm import CausalLM
from pymllm.weights.gguf_architecture import LAYER_MODULES, GGUFArchitecture

DEFAULTS = {
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "sliding_window": None,
}
GGUF = {
    "phi3": GGUFArchitecture(
        "phi3",
        {
            name: to
            for name, to in LAYER_MODULES.items()
            if name not in ("attn_q", "attn_k", "attn_v", "ffn_gate")
        }
        | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
        sliding=0,
    )
}


class Model(CausalLM):
    """Phi3ForCausalLM."""

    @property
    def restart_length(self) -> int | None:  # type: ignore[override]
        """Past the trained length, LongRoPE has other frequencies for all positions."""
        rope = self.config.rope_parameters
        return rope.scaling["original_max_position_embeddings"] + 1 if rope.rope_type == "longrope" else None

    def attention_options(self) -> dict[str, Any]:
        return {"part_names": ("qkv_proj",)}

    def mlp_options(self) -> dict[str, Any]:
        return {"activation": self.config.hidden_act, "part_names": ("gate_up_proj",)}
