"""Qwen3: Llama with a norm on each head of q and k."""

from __future__ import annotations

from typing import Any

from pymllm.layers.layernorm import RMSNorm
from pymllm.models import llama
from pymllm.weights.gguf_architecture import GGUFArchitecture

DEFAULTS = {
    **llama.DEFAULTS,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
GGUF = {"qwen3": GGUFArchitecture("qwen3", sliding=0)}


class Model(llama.Model):
    """Qwen3ForCausalLM."""

    def attention_options(self) -> dict[str, Any]:
        return {**super().attention_options(), "qk_norm": RMSNorm}
